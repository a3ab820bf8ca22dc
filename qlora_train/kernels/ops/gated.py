"""A gated product and the linear layer on it: h = f(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    dup = f(gate) dh          dgate = f'(gate) up dh

gate and up alone are kept for the backward pass, which makes f(gate) and h again: two passes over numbers that are at hand,
against half of what an MLP keeps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qlora_train.kernels.lora_dropout import masked, masked_
from qlora_train.kernels.lora_linear import LoraLayers, Rounded, gradients, products
from qlora_train.kernels.ops import dispatch
from qlora_train.kernels.saved_tensors import keep


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of one number.

    Attributes:
        name: of `ACTIVATIONS`.
        forward: f(x).
        backward: (dy, x) -> f'(x) dy.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(name: str, approximate: str) -> Activation:
    def forward(x: Tensor) -> Tensor:
        return functional.gelu(x, approximate=approximate)

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
        return found

    return Activation(name, forward, backward)


ACTIVATIONS: Mapping[str, Activation] = {
    each.name: each
    for each in (
        Activation("silu", functional.silu, torch.ops.aten.silu_backward),
        _gelu("gelu", "none"),
        _gelu("gelu_tanh", "tanh"),
    )
}


def _product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return activation.forward(gate).mul_(up)


def _product_again(gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Callable[[Tensor], Any]]:
    activated = activation.forward(gate)

    def gradients(grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_up = activated.mul_(grad)
        return activation.backward(grad.mul_(up), gate), grad_up

    return activated * up, gradients


class _Operation(NamedTuple):
    """f(gate) * up, from (gate, up, f).

    Attributes:
        product: gives h.
        again: gives h for the backward pass, and dh -> (dgate, dup), which uses dh up.
    """

    product: Callable[..., Tensor]
    again: Callable[..., tuple[Tensor, Callable[[Tensor], Any]]]


PLAIN = _Operation(_product, _product_again)


def _operation(x: Tensor) -> _Operation:
    if dispatch.runs_triton(x):
        from qlora_train.kernels.ops import gated_triton as kernels

        def product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
            return kernels.forward(gate, up, activation.name)

        def again(gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Callable[[Tensor], Any]]:
            gradients = partial(kernels.backward, gate=gate, up=up, activation=activation.name)
            return product(gate, up, activation), gradients

        return _Operation(product, again)
    return PLAIN


def gated_linear(gate: Tensor, up: Tensor, activation: Activation, layer: LoraLayers) -> Tensor:
    """Return an adapted layer's output for f(gate) * up, (..., out).

    Args:
        gate: (..., in).
        up: (..., in).
        activation: f.
        layer: a group of one.
    """
    rounded, mask = Rounded.of(layer), layer.draw_mask(gate.view(-1, gate.shape[-1]))
    # kept before the layer's product is made, which a backward pass that computes the layer again does not need
    (kept_gate, kept_up), keeper = keep([gate, up], [mask, rounded.a, *rounded.b])
    output: Tensor = _GatedLinear.apply(
        kept_gate, kept_up, keeper, activation, layer, rounded, mask, *layer.a, *layer.b
    )
    return output


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        keeper: Any,
        activation: Activation,
        layer: LoraLayers,
        rounded: Rounded,
        mask: Tensor | None,
        *_factors: Tensor,
    ) -> Tensor:
        ctx.keeper, ctx.activation, ctx.layer = keeper, activation, layer
        rows = _operation(gate).product(gate, up, activation).view(-1, gate.shape[-1])
        [output] = products(rows, masked(rows, mask) @ rounded.a.T, layer, rounded, gate.shape[:-1])
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gate, up, mask, a, *b = ctx.keeper.saved_tensors
        product, gradients_of = _operation(gate).again(gate, up, ctx.activation)
        read, rounded = masked_(product.view(-1, gate.shape[-1]), mask), Rounded(a, b)
        found = gradients(read, mask, read @ a.T, [grad], ctx.layer, rounded, wants_rows=True)
        assert found.rows is not None
        grad_gate, grad_up = gradients_of(found.rows.view(gate.shape))
        return grad_gate, grad_up, None, None, None, None, None, *found.a, *found.b
