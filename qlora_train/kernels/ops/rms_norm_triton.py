"""RMS norm, forward and backward in one pass each: `rms_norm` is the reference.

A row stays in registers; the reference writes every intermediate in float32 to memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_train.kernels.ops.rms_norm import Variant
from qlora_train.kernels.ops.triton_rows import as_rows

NUM_ELEMENTS = 2048
"""Elements per program, unless a row has more."""


@triton.jit
def _applied(weight, offset, ROUNDS_FIRST: tl.constexpr):
    """Return the weight plus offset in float32, rounded to its dtype where the reference adds in it."""
    applied = weight.to(tl.float32) + offset
    if ROUNDS_FIRST:
        applied = applied.to(weight.dtype).to(tl.float32)
    return applied


@triton.jit
def _forward(
    y, scale, x, weight, x_stride, num_rows, num_features, eps, offset,
    ROUNDS_FIRST: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    feature = tl.arange(0, NUM_FEATURES)
    inside = (row < num_rows)[:, None] & (feature < num_features)[None, :]
    values = tl.load(x + row[:, None] * x_stride + feature[None, :], inside, other=0.0)
    wide = values.to(tl.float32)
    scales = tl.rsqrt(tl.sum(wide * wide, 1) / num_features + eps)
    tl.store(scale + row, scales, row < num_rows)

    applied = _applied(tl.load(weight + feature, feature < num_features, other=0.0), offset, ROUNDS_FIRST)
    normal = wide * scales[:, None]
    if ROUNDS_FIRST:
        normal = normal.to(values.dtype).to(tl.float32)
    target = y + row[:, None] * num_features + feature[None, :]
    tl.store(target, (normal * applied[None, :]).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    grad_x, grad, x, weight, scale, grad_stride, x_stride, num_rows, num_features, offset,
    ROUNDS_FIRST: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    feature = tl.arange(0, NUM_FEATURES)
    inside = (row < num_rows)[:, None] & (feature < num_features)[None, :]
    wide = tl.load(x + row[:, None] * x_stride + feature[None, :], inside, other=0.0).to(tl.float32)
    grads = tl.load(grad + row[:, None] * grad_stride + feature[None, :], inside, other=0.0)
    scales = tl.load(scale + row, row < num_rows, other=0.0)

    applied = _applied(tl.load(weight + feature, feature < num_features, other=0.0), offset, ROUNDS_FIRST)
    inner = grads.to(tl.float32) * applied[None, :]
    if ROUNDS_FIRST:
        inner = inner.to(grads.dtype).to(tl.float32)
    mean = tl.sum(inner * wide, 1) / num_features * (scales * scales * scales)
    grads_x = inner * scales[:, None] - wide * mean[:, None]
    tl.store(grad_x + row[:, None] * num_features + feature[None, :], grads_x.to(grad_x.dtype.element_ty), inside)


def forward(x: Tensor, weight: Tensor, eps: float, variant: Variant) -> tuple[Tensor, Tensor]:
    """Return the normalized x, (..., features), and the scale of each row, (..., 1) float32."""
    rows = as_rows(x)
    dtype = torch.promote_types(x.dtype, weight.dtype) if variant.rounds_first else x.dtype
    y = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    grid, constants = _launch(rows)
    with torch.cuda.device_of(x):
        _forward[grid](
            y, scale, rows, weight, rows.stride(0), *rows.shape, eps, variant.offset,
            ROUNDS_FIRST=variant.rounds_first, **constants,
        )  # fmt: skip
    return y, scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, variant: Variant) -> Tensor:
    """Return the gradient of x, (..., features)."""
    grads, rows = as_rows(grad), as_rows(x)
    grad_x = x.new_empty(x.shape)
    grid, constants = _launch(rows)
    with torch.cuda.device_of(x):
        _backward[grid](
            grad_x, grads, rows, weight, scale, grads.stride(0), rows.stride(0), *rows.shape, variant.offset,
            ROUNDS_FIRST=variant.rounds_first, **constants,
        )  # fmt: skip
    return grad_x


def _launch(rows: Tensor) -> tuple[tuple[int], dict[str, int | bool]]:
    """Return the grid and the compile-time constants."""
    num_features = triton.next_power_of_2(rows.shape[1])
    num_rows = max(1, NUM_ELEMENTS // num_features)
    num_warps = min(max(num_rows * num_features // 512, 4), 16)
    constants = {
        "NUM_ROWS": num_rows, "NUM_FEATURES": num_features, "num_warps": num_warps, "enable_fp_fusion": False,
    }  # fmt: skip
    return (triton.cdiv(rows.shape[0], num_rows),), constants
