"""A gated product and the adapted linear layer on it: h = f(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    dup = f(gate) dh          dgate = f'(gate) up dh

Only gate and up are saved; the backward pass recomputes f(gate) and h, which halves the saved activations of an MLP.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qlora_train.kernels.lora_dropout import masked, masked_
from qlora_train.kernels.lora_linear import LoraLayers, RoundedFactors, lora_gradients, lora_outputs
from qlora_train.kernels.ops import dispatch
from qlora_train.kernels.saved_tensors import save_for_backward


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function f: `forward` x -> f(x); `backward` (dy, x) -> f'(x) dy; `name` in `ACTIVATIONS`."""

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(name: str, approximate: str) -> Activation:
    forward = partial(functional.gelu, approximate=approximate)
    return Activation(name, forward, partial(torch.ops.aten.gelu_backward, approximate=approximate))


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation("silu", functional.silu, torch.ops.aten.silu_backward),
    "gelu": _gelu("gelu", "none"),
    "gelu_tanh": _gelu("gelu_tanh", "tanh"),
}


class GatedProduct(NamedTuple):
    """f(gate) * up, from (gate, up, f).

    Attributes:
        forward: returns h.
        recompute: returns h in the backward pass, and dh -> (dgate, dup), which overwrites dh.
    """

    forward: Callable[..., Tensor]
    recompute: Callable[..., tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]]


def _forward(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return activation.forward(gate).mul_(up)


def _recompute(
    gate: Tensor, up: Tensor, activation: Activation
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    activated = activation.forward(gate)

    def gradients(grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_up = activated.mul_(grad)
        return activation.backward(grad.mul_(up), gate), grad_up

    return activated * up, gradients


REFERENCE = GatedProduct(_forward, _recompute)


def _operation(x: Tensor) -> GatedProduct:
    if not dispatch.runs_triton(x):
        return REFERENCE
    from qlora_train.kernels.ops import gated_triton as kernels

    def forward(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        return kernels.forward(gate, up, activation.name)

    def recompute(gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Callable[[Tensor], Any]]:
        gradients = partial(kernels.backward, gate=gate, up=up, activation=activation.name)
        return forward(gate, up, activation), gradients

    return GatedProduct(forward, recompute)


def gated_linear(gate: Tensor, up: Tensor, activation: Activation, layer: LoraLayers) -> Tensor:
    """Return the output of an adapted layer, a group of one, for f(gate) * up: (..., in) -> (..., out)."""
    factors, mask = RoundedFactors.of(layer), layer.draw_mask(gate.view(-1, gate.shape[-1]))
    # saved before the matmul of the layer, so that checkpointing does not recompute it
    (saved_gate, saved_up), saved = save_for_backward([gate, up], [mask, factors.a, *factors.b])
    output: Tensor = _GatedLinear.apply(
        saved_gate, saved_up, saved, activation, layer, factors, mask, *layer.a, *layer.b
    )
    return output


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        saved: Any,
        activation: Activation,
        layer: LoraLayers,
        factors: RoundedFactors,
        mask: Tensor | None,
        *_factors: Tensor,
    ) -> Tensor:
        ctx.saved, ctx.activation, ctx.layer = saved, activation, layer
        rows = _operation(gate).forward(gate, up, activation).view(-1, gate.shape[-1])
        [output] = lora_outputs(rows, masked(rows, mask) @ factors.a.T, layer, factors, gate.shape[:-1])
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gate, up, mask, a, *b = ctx.saved.saved_tensors
        product, gradients_of = _operation(gate).recompute(gate, up, ctx.activation)
        rows, factors = masked_(product.view(-1, gate.shape[-1]), mask), RoundedFactors(a, b)
        grad_rows, grad_factors = lora_gradients(rows, mask, rows @ a.T, [grad], ctx.layer, factors, needs_rows=True)
        assert grad_rows is not None
        grad_gate, grad_up = gradients_of(grad_rows.view(gate.shape))
        return grad_gate, grad_up, None, None, None, None, None, *grad_factors
