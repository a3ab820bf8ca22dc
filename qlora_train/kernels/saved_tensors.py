"""Tensors kept for a backward pass by a step of its own, before what they are kept for is computed.

Where a layer is computed again in the backward pass, that stops as soon as everything that was kept is there: what comes
after a step of its own, and is not needed, is not computed again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def keep(passed: Sequence[Tensor], others: Sequence[Tensor | None] = ()) -> tuple[tuple[Tensor, ...], Any]:
    """Keep tensors of which one at least has a gradient.

    Args:
        passed: through which gradients pass.
        others: kept beside them.

    Returns:
        `passed` to compute on with, and what has all of them as `saved_tensors` in the backward pass.
    """
    through: tuple[Tensor, ...] = _Keep.apply(len(passed), *passed, *others)
    return through, next(tensor.grad_fn for tensor in through if tensor.requires_grad)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_passed: int, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.num_others = len(tensors) - num_passed
        return tuple(tensor.view_as(tensor) for tensor in tensors[:num_passed])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *grads, *[None] * ctx.num_others
