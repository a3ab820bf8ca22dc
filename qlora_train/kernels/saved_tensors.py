"""Tensors saved for a backward pass by an autograd node of their own, before the operation that needs them.

Non-reentrant activation checkpointing stops to recompute once every saved tensor is recomputed. An operation that comes
after this node, and saves nothing itself, is then not recomputed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def save_for_backward(
    differentiable: Sequence[Tensor], others: Sequence[Tensor | None] = ()
) -> tuple[tuple[Tensor, ...], Any]:
    """Save tensors, of which at least one requires a gradient.

    Returns:
        `differentiable` to compute on with, and the node whose `saved_tensors` are all of them in the backward pass; None
        without gradients.
    """
    if not torch.is_grad_enabled():
        return tuple(differentiable), None
    through: tuple[Tensor, ...] = _Save.apply(len(differentiable), *differentiable, *others)
    return through, next(tensor.grad_fn for tensor in through if tensor.requires_grad)


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_differentiable: int, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.num_others = len(tensors) - num_differentiable
        return tuple(tensor.view_as(tensor) for tensor in tensors[:num_differentiable])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *grads, *[None] * ctx.num_others
