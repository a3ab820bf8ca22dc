"""Rotary position embedding of queries and keys (Su et al. 2021, https://arxiv.org/abs/2104.09864), halves as in Llama.

    y1 = x1 cos1 - x2 sin1      dx1 = dy1 cos1 + dy2 sin2
    y2 = x2 cos2 + x1 sin2      dx2 = dy2 cos2 - dy1 sin1

with x1, x2 the halves of x along the features.
"""

from typing import Any

import torch
from torch import Tensor

from qlora_train.kernels.ops.dispatch import Operation, operation


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x, (batch, heads, seq, features), of any strides; cos and sin are (batch or 1, 1, seq, features)."""
    rotated: Tensor = _Rotate.apply(x, cos, sin)
    return rotated


def _forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = torch.mul(x, cos, out=x.new_empty(x.shape))
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = grad.shape[-1] // 2
    batch, heads, seq, features = grad.shape
    grad_x = grad.new_empty(batch, seq, heads, features).transpose(1, 2)  # strides of the projection's output
    torch.mul(grad, cos, out=grad_x)
    grad_x[..., :half].addcmul_(grad[..., half:], sin[..., half:])
    grad_x[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
    return grad_x


REFERENCE = Operation(_forward, _backward)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y: Tensor = operation(x, REFERENCE, "rotary").forward(x, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return operation(grad, REFERENCE, "rotary").backward(grad, cos, sin), None, None
