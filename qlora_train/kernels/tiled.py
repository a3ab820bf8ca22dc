"""Tiled computation of a function that maps each row of its input independently, such as an MLP.

    y_t = f(x_t; w)          dx_t = (df/dx_t)' dy_t          dw = sum_t (df/dw)' dy_t

Activations inside f then exist for one tile of rows at a time; with f recomputed in the backward pass, tile by tile, their
memory does not grow with the number of rows. The gradients of the weights are summed from the last tile to the first, as
autograd sums them: recomputed or not, results are bitwise equal.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_train.kernels.block_sizes import TILE_ROWS
from qlora_train.kernels.saved_tensors import save_for_backward

Function = Callable[[Tensor], Tensor]
"""(rows, in) -> (rows, out)."""


def exceeds_tile(x: Tensor) -> bool:
    """Return whether x, (..., in), has more rows than a tile."""
    return x.numel() > TILE_ROWS * x.shape[-1]


def compute_tiled(function: Function, x: Tensor) -> Tensor:
    """Return f(x), (..., out), for x of (..., in), with all activations saved."""
    if not exceeds_tile(x):
        return function(x)
    y = torch.cat([function(tile) for tile in x.reshape(-1, x.shape[-1]).split(TILE_ROWS)])
    return y.view(*x.shape[:-1], -1)


def checkpoint_tiled(function: Function, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return f(x), (..., out), for x of (..., in), with only x saved and f recomputed in the backward pass.

    Args:
        function: f; it may draw random numbers from the default CPU generator only.
        x: its input.
        weights: w, all trained parameters of f.
    """
    x = x if x.requires_grad else x.detach().requires_grad_()
    [rows], saved = save_for_backward([x.reshape(-1, x.shape[-1])])
    y: Tensor = _CheckpointedTiled.apply(rows, saved, function, *weights)
    return y.view(*x.shape[:-1], -1)


class _CheckpointedTiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, saved: Any, function: Function, *weights: Tensor) -> Tensor:
        ctx.saved, ctx.function, ctx.weights = saved, function, weights
        device = rows.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = partial(torch.autocast, device, dtype=dtype, enabled=enabled)
        ctx.rng_states, outputs = [], []
        # fused kernels run only if gradients are on; nothing is saved
        with torch.enable_grad(), saved_tensors_hooks(lambda _: None, _not_saved):
            for tile in rows.split(TILE_ROWS):
                ctx.rng_states.append(torch.get_rng_state())
                outputs.append(function(tile.detach()).detach())
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        [rows] = ctx.saved.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_weights: list[Tensor | None] = [None] * len(ctx.weights)
        tiles = [each.split(TILE_ROWS) for each in (rows, grad, grad_rows)]
        rng_state = torch.get_rng_state()
        for tile, grad_tile, out, state in reversed(list(zip(*tiles, ctx.rng_states, strict=True))):
            leaf = tile.detach().requires_grad_()
            torch.set_rng_state(state)
            with torch.enable_grad(), ctx.autocast():
                y = ctx.function(leaf)
            grad_leaf, *more = torch.autograd.grad(y, [leaf, *ctx.weights], grad_tile, allow_unused=True)
            out.copy_(grad_leaf)
            grad_weights = [_sum(one, other) for one, other in zip(grad_weights, more, strict=True)]
        torch.set_rng_state(rng_state)
        return grad_rows, None, None, *grad_weights


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def _not_saved(_: None) -> Tensor:
    raise AssertionError("this graph has no backward pass")
