"""Frozen linear layers with low-rank changes that read the same input, in one step each way.

For the layers i of a group, with frozen weights W_i (out_i, in), factors A_i (r_i, in) and B_i (out_i, r_i) and scales s_i:

    y_i  = x W_i' + bias_i + (x A_i') (s_i B_i)'
    dx   = sum_i dy_i W_i + (dy_i s_i B_i) A_i
    dA_i = (dy_i s_i B_i)' x          dB_i = s_i dy_i' (x A_i')

x is kept once for the whole group, and the A_i are one product. The low-rank part is added inside the product, where sums
are float32, instead of being rounded by itself first. Factors stay float32; they are rounded to the compute dtype for the
products, and their gradients are float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_train.kernels.frozen_weight import FrozenWeight


def lora_linears(
    x: Tensor, weights: Sequence[FrozenWeight], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Tensor, ...]:
    """Return the output of every layer of a group, each (..., out_i) in the dtype of x.

    Args:
        x: (..., in).
        weights: of the layers, all of one compute dtype.
        a: (r_i, in) of each.
        b: (out_i, r_i) of each.
        scales: of each.
    """
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(x, tuple(weights), tuple(scales), *a, *b)
    return outputs


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: tuple[FrozenWeight, ...], scales: tuple[float, ...], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        dtype, (a, b) = weights[0].dtype, _halves(factors)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        low = rows @ torch.cat(list(a)).to(dtype).T
        outputs = []
        for weight, factor, scale, part in zip(
            weights, b, scales, low.split([len(each) for each in a], 1), strict=True
        ):
            output = rows.new_empty((*x.shape[:-1], len(factor)))  # not a view: models may change it in place
            flat = output.view(len(rows), len(factor))
            if weight.bias is None:
                torch.mm(rows, weight.read().T, out=flat)
            else:
                torch.addmm(weight.bias.to(dtype), rows, weight.read().T, out=flat)
            flat.addmm_(part, (factor * scale).to(dtype).T)
            outputs.append(output.to(x.dtype))
        ctx.save_for_backward(rows, low, *factors)
        ctx.weights, ctx.scales, ctx.shape, ctx.dtype = weights, scales, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows, low, *factors = ctx.saved_tensors
        a, b = _halves(factors)
        dtype, ranks = rows.dtype, [len(each) for each in a]
        grad_rows: Tensor | None = None
        grad_low = torch.zeros_like(low) if any(grad is None for grad in grads) else torch.empty_like(low)
        grad_b: list[Tensor | None] = []
        parts = zip(ctx.weights, grads, b, ctx.scales, low.split(ranks, 1), grad_low.split(ranks, 1), strict=True)
        for weight, grad, factor, scale, part, grad_part in parts:
            if grad is None:
                grad_b.append(None)
                continue
            flat = grad.reshape(len(rows), -1).to(dtype)
            torch.mm(flat, (factor * scale).to(dtype), out=grad_part)
            grad_b.append((part.T @ flat).T.to(factor.dtype, memory_format=torch.contiguous_format).mul_(scale))
            if ctx.needs_input_grad[0]:
                frozen = weight.read()
                grad_rows = flat @ frozen if grad_rows is None else grad_rows.addmm_(flat, frozen)
        grad_a = (grad_low.T @ rows).to(a[0].dtype).split(ranks)
        if grad_rows is not None:
            grad_rows = grad_rows.addmm_(grad_low, torch.cat(list(a)).to(dtype)).view(ctx.shape).to(ctx.dtype)
        return grad_rows, None, None, *grad_a, *grad_b


def _halves(factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    middle = len(factors) // 2
    return factors[:middle], factors[middle:]
