"""Frozen linear layers with LoRA that read the same input, as one operation.

For the layers i of a group, with frozen weights W_i (out_i, in), factors A_i (r_i, in) and B_i (out_i, r_i) and scales s_i:

    y_i  = x W_i' + bias_i + (m * x (s_i A_i)') B_i'
    dx   = sum_i dy_i W_i + m * (dy_i B_i) (s_i A_i)
    dA_i = s_i (dy_i B_i)' (m * x)          dB_i = dy_i' (m * x (s_i A_i)')

m is the mask of LoRA dropout (`lora_dropout`), all ones without. x is saved once per group, and all A_i are one matmul.
The LoRA part is computed first and the base product accumulated onto it in float32: added to a rounded base output, updates
below half an ulp, as in the first steps, would be lost. Factors are float32, rounded to the compute dtype once per forward
pass; their gradients are float32.
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
        dropout: p.
    """

    weights: Sequence[FrozenWeight]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]
    dropout: float = 0.0

    def draw_mask(self, rows: Tensor) -> Tensor | None:
        """Return the mask of LoRA dropout for rows, (rows, in); None without dropout."""
        return draw_mask(len(rows), rows.shape[-1], self.dropout, rows.device)


@dataclass(frozen=True, slots=True)
class RoundedFactors:
    """The factors of a group in the compute dtype: `a` all s_i A_i, (sum of r_i, in); `b` B_i', (r_i, out_i)."""

    a: Tensor
    b: Sequence[Tensor]

    @classmethod
    def of(cls, layers: LoraLayers) -> "RoundedFactors":
        dtype = layers.weights[0].dtype
        a = torch.cat([factor * scale for factor, scale in zip(layers.a, layers.scales, strict=True)])
        return cls(a.to(dtype), [factor.to(dtype).T for factor in layers.b])

    @property
    def ranks(self) -> list[int]:
        return [len(factor) for factor in self.b]


def lora_linears(x: Tensor, layers: LoraLayers) -> tuple[Tensor, ...]:
    """Return the output of every layer, (..., out_i), in the dtype of x, which is (..., in)."""
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(x, layers, *layers.a, *layers.b)
    return outputs


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: LoraLayers, *_factors: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(layers.weights[0].dtype)
        factors, mask = RoundedFactors.of(layers), layers.draw_mask(rows)
        low = masked(rows, mask) @ factors.a.T
        outputs = lora_outputs(rows, low, layers, factors, x.shape[:-1])
        ctx.save_for_backward(rows, mask, low, factors.a, *factors.b)
        ctx.layers, ctx.shape, ctx.dtype = layers, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(output.to(x.dtype) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows, mask, low, a, *b = ctx.saved_tensors
        grad_rows, grad_factors = lora_gradients(
            masked(rows, mask), mask, low, grads, ctx.layers, RoundedFactors(a, b), needs_rows=ctx.needs_input_grad[0]
        )
        grad_x = None if grad_rows is None else grad_rows.view(ctx.shape).to(ctx.dtype)
        return grad_x, None, *grad_factors


def lora_outputs(
    rows: Tensor, low: Tensor, layers: LoraLayers, factors: RoundedFactors, leading: Sequence[int]
) -> list[Tensor]:
    """Return y_i, (*leading, out_i), from x as `rows` (rows, in) and `low` = m * x (s_i A_i)', (rows, sum of r_i).

    The outputs are no views: models may modify them in place.
    """
    outputs = []
    for weight, b, part in zip(layers.weights, factors.b, low.split(factors.ranks, 1), strict=True):
        output = part @ b if weight.bias is None else torch.addmm(weight.bias.to(rows.dtype), part, b)
        output.addmm_(rows, weight.read().T)
        outputs.append(output.resize_(*leading, b.shape[1]))
    return outputs


def lora_gradients(
    masked_rows: Tensor,
    mask: Tensor | None,
    low: Tensor,
    grads: Sequence[Tensor | None],
    layers: LoraLayers,
    factors: RoundedFactors,
    *,
    needs_rows: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x as rows, None unless needed, and those of all A_i and then all B_i, in their dtypes.

    `masked_rows` is m * x; `grads` are those of the outputs, None for an output that nothing read.
    """
    ranks = factors.ranks
    grad_low = torch.zeros_like(low) if any(grad is None for grad in grads) else torch.empty_like(low)
    grad_b: list[Tensor | None] = []
    base_grads: list[tuple[Tensor, FrozenWeight]] = []
    each = zip(layers.weights, layers.b, factors.b, low.split(ranks, 1), grad_low.split(ranks, 1), grads, strict=True)
    for weight, factor, b, part, grad_part, grad in each:
        if grad is None:
            grad_b.append(None)
            continue
        flat = grad.reshape(len(masked_rows), -1).to(masked_rows.dtype)
        torch.mm(flat, b.T, out=grad_part)
        grad_b.append((flat.T @ part).to(factor.dtype))
        base_grads.append((flat, weight))
    grad_rows = masked_(grad_low @ factors.a, mask) if needs_rows and base_grads else None
    if grad_rows is not None:
        for flat, weight in base_grads:
            grad_rows.addmm_(flat, weight.read())
    grad_a = (grad_low.T @ masked_rows).to(layers.a[0].dtype).split(ranks)
    return grad_rows, [*(grad.mul_(scale) for grad, scale in zip(grad_a, layers.scales, strict=True)), *grad_b]
