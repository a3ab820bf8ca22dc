"""A function of rows that do not see each other, computed some rows at a time.

    y_t = f(x_t; w)          dx_t = (df/dx_t)' dy_t          dw = sum_t (df/dw)' dy_t

What is inside f, a wide MLP say, then exists for the rows of one tile alone: with f computed again in the backward pass,
tile by tile, the memory of its inside does not grow with the number of rows. Each tile is computed as by itself, and the
gradients of the weights are summed from the last tile to the first, as autograd sums them: the bits are the same whether f
is computed again or not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_train.kernels.saved_tensors import keep

TILE_ROWS = 4096
"""Rows at a time: as many as a GPU needs to multiply at its full rate."""

Function = Callable[[Tensor], Tensor]
"""(rows, in) -> (rows, out), each row from its own row of the input."""


def fill_tiles(x: Tensor) -> bool:
    """Say whether x, (..., in), has more rows than a tile."""
    return x.numel() > TILE_ROWS * x.shape[-1]


def in_tiles(function: Function, x: Tensor) -> Tensor:
    """Return f(x), (..., out), for x of (..., in); everything inside is kept for the backward pass."""
    if not fill_tiles(x):
        return function(x)
    y = torch.cat([function(tile) for tile in x.reshape(-1, x.shape[-1]).split(TILE_ROWS)])
    return y.view(*x.shape[:-1], -1)


def recomputed_in_tiles(function: Function, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return f(x), (..., out), for x of (..., in), which alone is kept; the backward pass computes f again.

    Args:
        function: f; what it draws from the default CPU generator is the same in both passes.
        x: what it reads.
        weights: w, all that f has that trains.
    """
    x = x if x.requires_grad else x.detach().requires_grad_()
    [kept], keeper = keep([x.reshape(-1, x.shape[-1])])
    y: Tensor = _Recomputed.apply(kept, keeper, function, *weights)
    return y.view(*x.shape[:-1], -1)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, keeper: Any, function: Function, *weights: Tensor) -> Tensor:
        ctx.keeper, ctx.function, ctx.weights = keeper, function, weights
        device = rows.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = partial(torch.autocast, device, dtype=dtype, enabled=enabled)
        ctx.random_states, outputs = [], []
        # f computes as it does where gradients are made, and nothing of it is kept
        with torch.enable_grad(), saved_tensors_hooks(lambda _: None, _unkept):
            for tile in rows.split(TILE_ROWS):
                ctx.random_states.append(torch.get_rng_state())
                outputs.append(function(tile.detach()).detach())
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        [rows] = ctx.keeper.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_weights: list[Tensor | None] = [None] * len(ctx.weights)
        tiles = [each.split(TILE_ROWS) for each in (rows, grad, grad_rows)]
        random_state = torch.get_rng_state()
        for tile, grad_tile, place, state in reversed(list(zip(*tiles, ctx.random_states, strict=True))):
            leaf = tile.detach().requires_grad_()
            torch.set_rng_state(state)
            with torch.enable_grad(), ctx.autocast():
                y = ctx.function(leaf)
            grad_leaf, *more = torch.autograd.grad(y, [leaf, *ctx.weights], grad_tile, allow_unused=True)
            place.copy_(grad_leaf)
            grad_weights = [_sum(one, other) for one, other in zip(grad_weights, more, strict=True)]
        torch.set_rng_state(random_state)
        return grad_rows, None, None, *grad_weights


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def _unkept(_: None) -> Tensor:
    raise AssertionError("the graph of a forward pass alone has no backward pass")
