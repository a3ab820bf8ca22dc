"""RMS normalisation with a frozen weight: forward as Transformers computes it, bit for bit, backward in one step.

    r = 1 / sqrt(mean(x^2) + eps)      y = w x r      dx = r g - x r^3 mean(g x)  with g = w dy

all in float32 (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467). Architectures differ in where they round and in
whether the weight is stored around 0 or around 1; `find_variant` tries a module's own forward to tell.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.ops.dispatch import Operation, operation

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True, slots=True)
class Variant:
    """How a module computes it: `offset` is added to the weight; the weight is applied before or after rounding."""

    offset: float
    rounds_first: bool


def find_variant(module: nn.Module) -> Variant | None:
    """Return how a module computes RMS normalisation; None where it computes something else, or its weight trains."""
    if not type(module).__name__.endswith("RMSNorm") or "forward" in vars(module):
        return None
    weight, eps = getattr(module, "weight", None), eps_of(module)
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or weight.ndim != 1 or eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 5, len(weight), generator=generator).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            wanted = module(x)
    except torch.OutOfMemoryError:  # says nothing about the module
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError):  # more arguments than x, or other shapes
        return None
    for offset, rounds_first in product((0.0, 1.0), (True, False)):
        variant = Variant(offset, rounds_first)
        if torch.equal(wanted, _forward(x, weight, eps, variant)[0]):
            return variant
    return None


def eps_of(module: nn.Module) -> float | None:
    """Return the number that a normalisation adds to the mean square; None where it has none."""
    found = next((getattr(module, name) for name in EPS_NAMES if hasattr(module, name)), None)
    return found if isinstance(found, float) else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, variant: Variant) -> Tensor:
    """Return the normalised x, (..., features), in its dtype."""
    output: Tensor = _RmsNorm.apply(x, weight, eps, variant)
    return output


def _forward(x: Tensor, weight: Tensor, eps: float, variant: Variant) -> tuple[Tensor, Tensor]:
    """Return y, and r for each row."""
    wide = x.to(torch.float32, copy=True)
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    normal = wide.mul_(scale)
    if variant.rounds_first:
        return _applied(weight, variant) * normal.to(x.dtype), scale
    return (normal * _applied(weight.float(), variant)).to(x.dtype), scale


def _backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, variant: Variant) -> Tensor:
    """Return dx."""
    wide = x.float()
    inner = (
        (grad * _applied(weight, variant)).float()
        if variant.rounds_first
        else (grad.float() * _applied(weight.float(), variant))
    )
    mean = (inner * wide).mean(-1, keepdim=True)
    return inner.mul_(scale).addcmul_(wide, mean.mul_(scale.pow(3)), value=-1).to(x.dtype)


def _applied(weight: Tensor, variant: Variant) -> Tensor:
    return weight + variant.offset if variant.offset else weight


PLAIN = Operation(_forward, _backward)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, variant: Variant) -> Tensor:
        y: Tensor
        y, scale = operation(x, PLAIN, "rms_norm").forward(x, weight, eps, variant)
        ctx.save_for_backward(x, weight, scale)
        ctx.variant = variant
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        return operation(x, PLAIN, "rms_norm").backward(grad, x, weight, scale, ctx.variant), None, None, None
