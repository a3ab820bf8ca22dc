"""The fast path: operations of this package in the place of a loaded model's own, on its own instances.

What an operation replaces is found by watching the model compute a few tokens and by trying modules on numbers, not by the
names of architectures. PEFT's modules stay in the tree; their forward is bound on the instance, computes with gradients
alone, and hands everything else (evaluation, a switched-off or merged adapter, further arguments) to the module's own.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.lora_linear import lora_linears
from qlora_train.kernels.rms_norm import Variant, eps_of, find_variant, rms_norm

Bound = Callable[..., Any]


@dataclass
class FastPath:
    """What was put into a model.

    Attributes:
        counts: modules by operation.
        left_out: adapted layers that compute as PEFT does, by reason.
        weights: of the adapted layers, in the order of the model.
        hooks: on the model.
    """

    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    weights: list[FrozenWeight] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    _bound: list[nn.Module] = field(default_factory=list)

    def described(self) -> str:
        """Say what was put in and what was left out."""
        parts = [f"{count} {operation}" for operation, count in self.counts.items()]
        parts += [f"{count} adapted layers as PEFT computes them ({why})" for why, count in self.left_out.items()]
        return ", ".join(parts) or "nothing of it applies to this model"

    def bind(self, module: nn.Module, forward: Bound) -> None:
        """Let a module compute with another forward."""
        assert "forward" not in vars(module), "bound already"
        module.forward = forward
        self._bound.append(module)

    def uninstall(self) -> None:
        """Let every module compute as it did."""
        for module in self._bound:
            del module.forward
        for hook in self.hooks:
            hook.remove()
        self._bound.clear()
        self.hooks.clear()


def install(model: nn.Module, run: Callable[[], Any]) -> FastPath:
    """Put every operation where it applies.

    Args:
        model: a base with its adapter.
        run: computes a few tokens with it.
    """
    fast = FastPath()
    groups = [_Group(layers) for layers in _layers_by_input(model, run, fast.left_out)]
    for group in groups:
        fast.weights += group.weights
        fast.counts["adapted linear layers"] += len(group.layers)
        fast.counts["groups of them that read the same input"] += len(group.layers) > 1
        for place, layer in enumerate(group.layers):
            fast.bind(layer, group.forward_of(place))

    def begin(_model: nn.Module, _inputs: Any) -> None:
        for group in groups:
            group.forget()

    fast.hooks.append(model.register_forward_pre_hook(begin))
    for module, variant in _norms(model):
        fast.counts["RMS norms"] += 1
        fast.bind(module, _norm_forward(module, variant))
    return fast


# --- adapted linear layers --------------------------------------------------------------------------------------------


def _layers_by_input(model: nn.Module, run: Callable[[], Any], left_out: Counter[str]) -> list[list[Any]]:
    """Return the adapted layers by the input they read, in the order in which they are called."""
    layers = []
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
            reason = _reason_against(module)
            if reason:
                left_out[reason] += 1
            else:
                layers.append(module)
    calls: list[tuple[Any, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: calls.append((module, inputs[0]))) for layer in layers
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(layer for layer, _ in calls)
    groups: list[list[Any]] = []
    previous: Tensor | None = None
    for layer, x in calls:
        if times[layer] > 1:
            continue
        if x is previous and _like(groups[-1][-1], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
        previous = x
    return groups + [[layer] for layer in layers if times[layer] != 1]


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
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "dropout"
    if layer.lora_bias[name]:
        return "an adapter with a bias"
    return ""


class _Group:
    """Adapted layers that read the same input: the first that is called computes all of them."""

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = list(layers)
        self.weights = [FrozenWeight(layer.get_base_layer()) for layer in self.layers]
        self._input: Tensor | None = None
        self._version = 0
        self._ready: dict[int, Tensor] = {}

    def forward_of(self, place: int) -> Bound:
        """Return the forward of one of the layers."""
        layer, own = self.layers[place], self.layers[place].forward

        def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
            if arguments or keywords or not torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
                return own(x, *arguments, **keywords)
            return self._output(place, x)

        return forward

    def forget(self) -> None:
        """Drop what a forward pass that failed has left: it would keep the whole graph before it alive."""
        self._input, self._ready = None, {}

    def _output(self, place: int, x: Tensor) -> Tensor:
        if self._input is not x or self._version != x._version or place not in self._ready:
            self._ready = dict(enumerate(self._compute(x)))
            self._input, self._version = x, x._version
        output = self._ready.pop(place)
        if not self._ready:
            self._input = None
        return output

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        names = [layer.active_adapters[0] for layer in self.layers]
        each = list(zip(self.layers, names, strict=True))
        return lora_linears(
            x,
            self.weights,
            [layer.lora_A[name].weight for layer, name in each],
            [layer.lora_B[name].weight for layer, name in each],
            [layer.scaling[name] for layer, name in each],
        )


# --- norms ------------------------------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> list[tuple[nn.Module, Variant]]:
    """Return the modules that compute RMS normalisation, each with how it does."""
    named = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    found = [(module, find_variant(module)) for module in named if "forward" not in vars(module)]
    return [(module, variant) for module, variant in found if variant is not None]


def _norm_forward(module: Any, variant: Variant) -> Bound:
    own, eps = module.forward, eps_of(module)
    assert eps is not None, "a variant has it"

    def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if arguments or keywords or not torch.is_grad_enabled():
            return own(x, *arguments, **keywords)
        return rms_norm(x, module.weight, eps, variant)

    return forward
