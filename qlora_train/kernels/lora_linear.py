"""Frozen linear layers with low-rank changes that read the same input, in one step each way.

For the layers i of a group, with frozen weights W_i (out_i, in), factors A_i (r_i, in) and B_i (out_i, r_i) and scales s_i:

    y_i  = x W_i' + bias_i + (m * x (s_i A_i)') B_i'
    dx   = sum_i dy_i W_i + m * (dy_i B_i) (s_i A_i)
    dA_i = s_i (dy_i B_i)' (m * x)          dB_i = dy_i' (m * x (s_i A_i)')

m is the mask of LoRA dropout (`kernels.dropout`), all ones without. x is kept once for the whole group, and the A_i are one
product. The low-rank part comes first, and the base product is summed onto it in float32: added to what is rounded already,
changes below half of its last digit, as those of the first steps are, would be lost. Factors stay float32; they are rounded
to the compute dtype once a forward pass, and their gradients are float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.lora_dropout import draw_mask, masked, masked_


@dataclass(frozen=True, slots=True)
class LoraLayers:
    """Adapted layers that read the same input.

    Attributes:
        weights: W_i, all of one compute dtype.
        a: A_i, (r_i, in).
        b: B_i, (out_i, r_i).
        scales: s_i, divided by 1 - p.
        dropout: p of what the A_i read.
    """

    weights: Sequence[FrozenWeight]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]
    dropout: float = 0.0

    def draw_mask(self, rows: Tensor) -> Tensor | None:
        """Return the mask of LoRA dropout for rows, (rows, in); None where nothing is dropped."""
        return draw_mask(len(rows), rows.shape[-1], self.dropout, rows.device)


@dataclass(frozen=True, slots=True)
class Rounded:
    """The factors of a group in the compute dtype.

    Attributes:
        a: all s_i A_i, (sum of r_i, in).
        b: B_i', (r_i, out_i) each.
    """

    a: Tensor
    b: Sequence[Tensor]

    @classmethod
    def of(cls, layers: LoraLayers) -> "Rounded":
        """Return the factors of a group, rounded."""
        dtype = layers.weights[0].dtype
        a = torch.cat([factor * scale for factor, scale in zip(layers.a, layers.scales, strict=True)])
        return cls(a.to(dtype), [factor.to(dtype).T for factor in layers.b])

    def ranks(self) -> list[int]:
        """Return r_i."""
        return [len(factor) for factor in self.b]


def lora_linears(x: Tensor, layers: LoraLayers) -> tuple[Tensor, ...]:
    """Return the output of every layer of a group, each (..., out_i) in the dtype of x, which is (..., in)."""
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(x, layers, *layers.a, *layers.b)
    return outputs


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: LoraLayers, *_factors: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(layers.weights[0].dtype)
        rounded, mask = Rounded.of(layers), layers.draw_mask(rows)
        low = masked(rows, mask) @ rounded.a.T
        outputs = products(rows, low, layers, rounded, x.shape[:-1])
        ctx.save_for_backward(rows, mask, low, rounded.a, *rounded.b)
        ctx.layers, ctx.shape, ctx.dtype = layers, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(output.to(x.dtype) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows, mask, low, a, *b = ctx.saved_tensors
        read = masked(rows, mask)
        found = gradients(read, mask, low, grads, ctx.layers, Rounded(a, b), wants_rows=ctx.needs_input_grad[0])
        grad_x = None if found.rows is None else found.rows.view(ctx.shape).to(ctx.dtype)
        return grad_x, None, *found.a, *found.b


def products(rows: Tensor, low: Tensor, layers: LoraLayers, rounded: Rounded, leading: Sequence[int]) -> list[Tensor]:
    """Return y_i, (*leading, out_i), from x as `rows` (rows, in) and m * x (s_i A_i)' as `low`, (rows, sum of r_i).

    They are tensors of their own and no views: models may change them in place.
    """
    outputs = []
    for weight, b, part in zip(layers.weights, rounded.b, low.split(rounded.ranks(), 1), strict=True):
        output = part @ b if weight.bias is None else torch.addmm(weight.bias.to(rows.dtype), part, b)
        output.addmm_(rows, weight.read().T)
        outputs.append(output.resize_(*leading, b.shape[1]))
    return outputs


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of a group: of x as rows, None unless it was asked for, and of the factors, in their dtypes."""

    rows: Tensor | None
    a: Sequence[Tensor]
    b: Sequence[Tensor | None]


def gradients(
    read: Tensor,
    mask: Tensor | None,
    low: Tensor,
    grads: Sequence[Tensor | None],
    layers: LoraLayers,
    rounded: Rounded,
    *,
    wants_rows: bool,
) -> Gradients:
    """Return the gradients of a group from those of its outputs, None for an output that nothing read; `read` is m * x."""
    ranks = rounded.ranks()
    grad_low = torch.zeros_like(low) if any(grad is None for grad in grads) else torch.empty_like(low)
    grad_b: list[Tensor | None] = []
    onto_rows: list[tuple[Tensor, FrozenWeight]] = []
    each = zip(layers.weights, layers.b, rounded.b, low.split(ranks, 1), grad_low.split(ranks, 1), grads, strict=True)
    for weight, factor, b, part, grad_part, grad in each:
        if grad is None:
            grad_b.append(None)
            continue
        flat = grad.reshape(len(read), -1).to(read.dtype)
        torch.mm(flat, b.T, out=grad_part)
        grad_b.append((flat.T @ part).to(factor.dtype))
        onto_rows.append((flat, weight))
    grad_rows = masked_(grad_low @ rounded.a, mask) if wants_rows and onto_rows else None
    if grad_rows is not None:
        for flat, weight in onto_rows:
            grad_rows.addmm_(flat, weight.read())
    grad_a = (grad_low.T @ read).to(layers.a[0].dtype).split(ranks)
    return Gradients(grad_rows, [grad.mul_(scale) for grad, scale in zip(grad_a, layers.scales, strict=True)], grad_b)
