"""Adapted linear layers that read the same input, such as q, k and v, found by recording a forward pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.fused_mode import fused_kernels_apply
from qlora_train.kernels.lora_dropout import MAX_RATE, rate_of
from qlora_train.kernels.lora_linear import LoraLayers, lora_linears


class InputGroup:
    """Adapted layers that read the same input: the first one called computes the outputs of all."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.weights = [FrozenWeight(layer.get_base_layer()) for layer in layers]
        self._input: Tensor | None = None
        self._version = 0
        self._outputs: dict[int, Tensor] = {}

    def forward_of(self, index: int) -> Callable[..., Any]:
        """Return the forward of one of the layers."""
        layer, own = self.layers[index], self.layers[index].forward

        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
            if arguments or keywords or not self.applies(layer):
                return own(x, *arguments, **keywords)
            return self._output(index, x)

        return forward

    @staticmethod
    def applies(layer: Any) -> bool:
        """Return whether a layer computes with its adapter and by fused kernels."""
        return fused_kernels_apply() and not layer.disable_adapters and not layer.merged

    def clear(self) -> None:
        """Drop the outputs left by a failed forward pass: they keep its whole graph alive."""
        self._input, self._outputs = None, {}

    def lora_layers(self) -> LoraLayers:
        """Return the layers with their active adapters."""
        each = [(layer, layer.active_adapters[0]) for layer in self.layers]
        [rate] = {rate_of(layer, name) for layer, name in each}
        return LoraLayers(
            self.weights,
            [layer.lora_A[name].weight for layer, name in each],
            [layer.lora_B[name].weight for layer, name in each],
            [layer.scaling[name] / (1 - rate) for layer, name in each],
            rate,
        )

    def _output(self, index: int, x: Tensor) -> Tensor:
        if self._input is not x or self._version != x._version or index not in self._outputs:
            self._outputs = dict(enumerate(lora_linears(x, self.lora_layers())))
            self._input, self._version = x, x._version
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


class InputRecorder:
    """Records which adapted layers of a model read the same input.

    Attributes:
        layers: that the fused kernels support.
        skipped: layers that compute as in PEFT, by reason.
    """

    def __init__(self, model: nn.Module) -> None:
        adapted = [
            module for module in model.modules() if isinstance(module, LoraLayer) and isinstance(module, nn.Module)
        ]
        reasons = [_unsupported(layer) for layer in adapted]
        self.layers: list[Any] = [layer for layer, reason in zip(adapted, reasons, strict=True) if not reason]
        self.skipped = Counter(reason for reason in reasons if reason)
        self._calls: list[tuple[Any, int]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the input of each call of a layer."""
        # numbers stand for inputs: the tensors themselves would keep all layers' inputs alive
        numbers, next_number = WeakIdKeyDictionary(), count()

        def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] not in numbers:
                numbers[inputs[0]] = next(next_number)
            self._calls.append((layer, numbers[inputs[0]]))

        handles = [layer.register_forward_pre_hook(record) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def groups(self) -> list[InputGroup]:
        """Return the groups in the order of their calls; a layer not called exactly once is a group of its own."""
        times = Counter(layer for layer, _ in self._calls)
        groups: list[list[Any]] = []
        previous: int | None = None
        for layer, number in self._calls:
            if times[layer] > 1:
                continue
            if number == previous and _compute_dtype(groups[-1][-1]) == _compute_dtype(layer):
                groups[-1].append(layer)
            else:
                groups.append([layer])
            previous = number
        groups += [[layer] for layer in self.layers if times[layer] != 1]
        return [InputGroup(layers) for layers in groups]


def _compute_dtype(layer: Any) -> torch.dtype:
    return FrozenWeight(layer.get_base_layer()).dtype


def _unsupported(layer: Any) -> str:
    """Return why an adapted layer computes as in PEFT; empty if the fused kernels support it."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        return "not a linear layer"
    if type(base).forward not in (nn.Linear.forward, Linear4bit.forward) or "forward" in vars(base):
        return "a custom forward"
    assert not any(parameter.requires_grad for parameter in base.parameters()), "the base is frozen"
    [name] = layer.active_adapters if len(layer.active_adapters) == 1 else [""]
    if name not in layer.lora_A:
        return "not one active adapter"
    if layer.lora_variant.get(name) is not None:
        return "DoRA"
    if getattr(layer.lora_dropout[name], "p", 0) > MAX_RATE:
        return f"dropout above {MAX_RATE}"
    if layer.lora_bias[name]:
        return "an adapter with a bias"
    return ""
