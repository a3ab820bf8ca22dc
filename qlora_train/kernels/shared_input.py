"""Adapted linear layers that read the same input, found by watching a model compute."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.lora_dropout import MAX_RATE, rate_of
from qlora_train.kernels.lora_linear import LoraLayers, lora_linears


class Group:
    """Adapted layers that read the same input: the first that is called computes all of them."""

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = list(layers)
        self.weights = [FrozenWeight(layer.get_base_layer()) for layer in self.layers]
        self._input: Tensor | None = None
        self._version = 0
        self._ready: dict[int, Tensor] = {}

    def forward_of(self, place: int) -> Callable[..., Any]:
        """Return the forward of one of the layers."""
        layer, own = self.layers[place], self.layers[place].forward

        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
            if arguments or keywords or not self.applies(layer):
                return own(x, *arguments, **keywords)
            return self._output(place, x)

        return forward

    @staticmethod
    def applies(layer: Any) -> bool:
        """Say whether a layer computes with its adapter, and for gradients."""
        return torch.is_grad_enabled() and not layer.disable_adapters and not layer.merged

    def forget(self) -> None:
        """Drop what a forward pass that failed has left: it would keep the whole graph before it alive."""
        self._input, self._ready = None, {}

    def now(self) -> LoraLayers:
        """Return the layers with their active adapters."""
        names = [layer.active_adapters[0] for layer in self.layers]
        each = list(zip(self.layers, names, strict=True))
        [rate] = {rate_of(layer, name) for layer, name in each}
        return LoraLayers(
            self.weights,
            [layer.lora_A[name].weight for layer, name in each],
            [layer.lora_B[name].weight for layer, name in each],
            [layer.scaling[name] / (1 - rate) for layer, name in each],
            rate,
        )

    def _output(self, place: int, x: Tensor) -> Tensor:
        if self._input is not x or self._version != x._version or place not in self._ready:
            self._ready = dict(enumerate(lora_linears(x, self.now())))
            self._input, self._version = x, x._version
        output = self._ready.pop(place)
        if not self._ready:
            self._input = None
        return output


class InputGroups:
    """The adapted layers of a model by the input they read.

    Attributes:
        skipped: layers that compute as PEFT does, by reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.skipped: Counter[str] = Counter()
        self.layers: list[Any] = []
        self._calls: list[tuple[Any, int]] = []
        # numbers of inputs: the tensors themselves would keep all layers' inputs alive
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._next_number = count()
        for module in model.modules():
            if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
                reason = _reason_against(module)
                if reason:
                    self.skipped[reason] += 1
                else:
                    self.layers.append(module)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what the layers are called with."""

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] not in self._numbers:
                self._numbers[inputs[0]] = next(self._next_number)
            self._calls.append((layer, self._numbers[inputs[0]]))

        handles = [layer.register_forward_pre_hook(note) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def groups(self) -> list[Group]:
        """Return the groups, in the order in which their layers were called."""
        times = Counter(layer for layer, _ in self._calls)
        groups: list[list[Any]] = []
        previous: int | None = None
        for layer, number in self._calls:
            if times[layer] > 1:
                continue
            if number == previous and _like(groups[-1][-1], layer):
                groups[-1].append(layer)
            else:
                groups.append([layer])
            previous = number
        groups += [[layer] for layer in self.layers if times[layer] != 1]
        return [Group(layers) for layers in groups]


def _like(one: Any, other: Any) -> bool:
    return FrozenWeight(one.get_base_layer()).dtype == FrozenWeight(other.get_base_layer()).dtype


def _reason_against(layer: Any) -> str:
    """Return why an adapted layer computes as PEFT does; empty where it does not."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        return "not a linear layer"
    if type(base).forward not in (nn.Linear.forward, Linear4bit.forward) or "forward" in vars(base):
        return "a forward of its own"
    assert not any(parameter.requires_grad for parameter in base.parameters()), "its forward is bound"
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
