"""f(gate) * up and its two gradients, one pass each: `gated` is the reference.

Activations are those of torch, in float32: silu(x) = x / (1 + exp(-x)), gelu by erf, and gelu by tanh, where

    1 + tanh(u) = 2 / (1 + exp(-2u))        1 - tanh(u)^2 = (1 + tanh(u)) (2 - (1 + tanh(u)))
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_train.kernels.ops.triton_rows import as_rows

NUM_ELEMENTS = 1024
SQRT_1_2 = tl.constexpr(0.7071067811865476)
SQRT_2_PI = tl.constexpr(0.7978845608028654)
"""sqrt(2 / pi)."""
MINUS_2_SQRT_2_PI = tl.constexpr(-1.5957691216057308)
DENSITY = tl.constexpr(0.3989422804014327)
"""1 / sqrt(2 pi), the normal density at 0."""
CUBIC = tl.constexpr(0.044715)
"""Of Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415."""


@triton.jit
def _value(x, ACTIVATION: tl.constexpr):
    """Return f(x)."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_1_2))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return 0.5 * x * (2.0 / (1.0 + tl.exp((x + x * x * x * CUBIC) * MINUS_2_SQRT_2_PI)))


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """Return f'(x)."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * SQRT_1_2)) + x * DENSITY * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        above = 2.0 / (1.0 + tl.exp((x + x * x * x * CUBIC) * MINUS_2_SQRT_2_PI))
        inner = (1.0 + x * x * CUBIC * 3.0) * SQRT_2_PI
        return 0.5 * above + 0.5 * x * above * (2.0 - above) * inner


@triton.jit
def _forward(
    product, gate, up, gate_stride, up_stride, num_features,
    ACTIVATION: tl.constexpr, NUM_ELEMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * NUM_ELEMENTS + tl.arange(0, NUM_ELEMENTS)
    inside = feature < num_features
    gates = tl.load(gate + row * gate_stride + feature, inside, other=0.0)
    ups = tl.load(up + row * up_stride + feature, inside, other=0.0).to(tl.float32)
    activated = _value(gates.to(tl.float32), ACTIVATION).to(gates.dtype).to(tl.float32)
    tl.store(product + row * num_features + feature, (activated * ups).to(gates.dtype), inside)


@triton.jit
def _backward(
    grad_gate, grad_up, grad, gate, up, grad_stride, gate_stride, up_stride, num_features,
    ACTIVATION: tl.constexpr, NUM_ELEMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * NUM_ELEMENTS + tl.arange(0, NUM_ELEMENTS)
    inside = feature < num_features
    gates = tl.load(gate + row * gate_stride + feature, inside, other=0.0)
    ups = tl.load(up + row * up_stride + feature, inside, other=0.0).to(tl.float32)
    grads = tl.load(grad + row * grad_stride + feature, inside, other=0.0).to(tl.float32)
    wide = gates.to(tl.float32)
    activated = _value(wide, ACTIVATION).to(gates.dtype).to(tl.float32)
    tl.store(grad_up + row * num_features + feature, (activated * grads).to(gates.dtype), inside)
    grad_activated = (grads * ups).to(gates.dtype).to(tl.float32)
    grad_gates = grad_activated * _slope(wide, ACTIVATION)
    tl.store(grad_gate + row * num_features + feature, grad_gates.to(gates.dtype), inside)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return f(gate) * up, (..., features), where `activation` names f."""
    gates, ups = as_rows(gate), as_rows(up)
    product = gate.new_empty(gate.shape)
    with torch.cuda.device_of(gate):
        _forward[_grid(gates)](
            product, gates, ups, gates.stride(0), ups.stride(0), gates.shape[1],
            ACTIVATION=activation, NUM_ELEMENTS=NUM_ELEMENTS, enable_fp_fusion=False,
        )  # fmt: skip
    return product


def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, (..., features), from that of their product."""
    grads, gates, ups = as_rows(grad), as_rows(gate), as_rows(up)
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    with torch.cuda.device_of(gate):
        _backward[_grid(gates)](
            grad_gate, grad_up, grads, gates, ups, grads.stride(0), gates.stride(0), ups.stride(0), gates.shape[1],
            ACTIVATION=activation, NUM_ELEMENTS=NUM_ELEMENTS, enable_fp_fusion=False,
        )  # fmt: skip
    return grad_gate, grad_up


def _grid(rows: Tensor) -> tuple[int, int]:
    return rows.shape[0], triton.cdiv(rows.shape[1], NUM_ELEMENTS)
