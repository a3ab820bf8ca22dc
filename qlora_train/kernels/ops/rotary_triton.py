"""Rotary position embedding of all heads in one pass: `rotary` is the reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_ELEMENTS = 2048
"""Max pairs of features per program."""


@triton.jit
def _rotate(
    y, x, cos, sin,
    y_batch, y_head, y_position, x_batch, x_head, x_position, cos_batch, cos_position, sin_batch, sin_position,
    num_positions, num_heads, half,
    IS_BACKWARD: tl.constexpr, NUM_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // num_positions).to(tl.int64)
    position = (tl.program_id(0) % num_positions).to(tl.int64)
    head = (tl.program_id(1) * NUM_HEADS + tl.arange(0, NUM_HEADS)).to(tl.int64)
    feature = tl.arange(0, HALF)
    is_feature = feature < half
    inside = (head < num_heads)[:, None] & is_feature[None, :]

    cos_row = cos + batch * cos_batch + position * cos_position + feature
    sin_row = sin + batch * sin_batch + position * sin_position + feature
    cos1 = tl.load(cos_row, is_feature, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_row + half, is_feature, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_row, is_feature, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_row + half, is_feature, other=0.0).to(tl.float32)
    source = x + batch * x_batch + position * x_position + head[:, None] * x_head + feature[None, :]
    first = tl.load(source, inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, inside, other=0.0).to(tl.float32)

    dtype = y.dtype.element_ty
    rotated1 = (first * cos1[None, :]).to(dtype).to(tl.float32)
    rotated2 = (second * cos2[None, :]).to(dtype).to(tl.float32)
    if IS_BACKWARD:
        rotated1 += second * sin2[None, :]
        rotated2 -= first * sin1[None, :]
    else:
        rotated1 -= second * sin1[None, :]
        rotated2 += first * sin2[None, :]
    target = y + batch * y_batch + position * y_position + head[:, None] * y_head + feature[None, :]
    tl.store(target, rotated1.to(dtype), inside)
    tl.store(target + half, rotated2.to(dtype), inside)


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x, (batch, heads, seq, features); cos and sin are (batch or 1, 1, seq, features)."""
    return _launch(x, cos, sin, x.new_empty(x.shape), is_backward=False)


def backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of x, contiguous as (batch, seq, heads, features)."""
    batch, heads, seq, features = grad.shape
    grad_x = grad.new_empty(batch, seq, heads, features).transpose(1, 2)
    return _launch(grad, cos, sin, grad_x, is_backward=True)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, *, is_backward: bool) -> Tensor:
    batch, heads, seq, features = x.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        # torch would refuse or broadcast what is too short; a kernel would read out of bounds
        if angles.shape not in {(batch, 1, seq, features), (1, 1, seq, features)}:
            raise ValueError(f"{name} of {tuple(x.shape)} is {tuple(angles.shape)}, not (batch or 1, 1, seq, features)")
    x, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, cos, sin))
    half = triton.next_power_of_2(features // 2)
    num_heads = min(triton.next_power_of_2(heads), max(1, NUM_ELEMENTS // half))
    with torch.cuda.device_of(x):
        _rotate[(batch * seq, triton.cdiv(heads, num_heads))](
            y, x, cos, sin, *y.stride()[:3], *x.stride()[:3],
            *_strides_of_angles(cos), *_strides_of_angles(sin), seq, heads, features // 2,
            IS_BACKWARD=is_backward, NUM_HEADS=num_heads, HALF=half, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _strides_of_angles(angles: Tensor) -> tuple[int, int]:
    """Return the strides of batch, 0 if all rows share their angles, and position."""
    return angles.stride(0) if angles.shape[0] > 1 else 0, angles.stride(2)
