"""The fast path: operations of this package in the place of a loaded model's own, on its own instances.

What an operation replaces is found by watching the model compute a few tokens and by trying modules on numbers, not by the
names of architectures. PEFT's modules stay in the tree; their forward is bound on the instance, computes with gradients
alone, and hands everything else (evaluation, a switched-off or merged adapter, further arguments) to the module's own.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.function_overrides import REPLACEMENTS, LookedUp
from qlora_train.kernels.fused_mlp import GatedMlp
from qlora_train.kernels.lora_dropout import lora_dropout_off
from qlora_train.kernels.ops.rms_norm import Variant, eps_of, find_variant, rms_norm
from qlora_train.kernels.shared_input import Group, InputGroups

Bound = Callable[..., Any]


@dataclass
class FusedKernels:
    """What was put into a model.

    Attributes:
        counts: modules by operation.
        skipped: adapted layers that compute as PEFT does, by reason.
        weights: of the adapted layers, in the order of the model.
        mlps: that compute with their last layer.
        hooks: on the model.
    """

    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    weights: list[FrozenWeight] = field(default_factory=list)
    mlps: list[GatedMlp] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    _bound: list[nn.Module] = field(default_factory=list)

    def summary(self) -> str:
        """Say what was put in and what was left out."""
        parts = [f"{count} {operation}" for operation, count in self.counts.items()]
        parts += [f"{count} adapted layers as PEFT computes them ({why})" for why, count in self.skipped.items()]
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


def install(model: nn.Module, run: Callable[[], Any]) -> FusedKernels:
    """Put every operation where it applies.

    Args:
        model: a base with its adapter.
        run: computes a few tokens with it.
    """
    by_input = InputGroups(model)
    looked_up = [found for module in model.modules() if (found := LookedUp.of(module)) is not None]
    with ExitStack() as watching, torch.no_grad():
        watching.enter_context(by_input.watched())
        for found in looked_up:
            watching.enter_context(found.watched())
        run()
    fast = FusedKernels(skipped=by_input.skipped)
    norms = [(module, variant) for module in model.modules() if (variant := find_variant(module)) is not None]
    with lora_dropout_off(by_input.layers):
        mlps = [mlp for module in model.modules() if (mlp := GatedMlp.of(module)) is not None]
    _put_linears(fast, model, by_input.groups(), mlps)
    for module, variant in norms:
        fast.counts["RMS norms"] += 1
        fast.bind(module, _norm_forward(module, variant))
    for found in looked_up:
        _put_looked_up(fast, found)
    return fast


def _put_linears(fast: FusedKernels, model: nn.Module, groups: list[Group], mlps: list[GatedMlp]) -> None:
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
    alone = {group.layers[0]: group for group in groups if len(group.layers) == 1}
    for mlp in mlps:
        down = alone.get(mlp.module.down_proj)
        if down is not None:
            fast.counts["gated MLPs"] += 1
            fast.mlps.append(mlp)
            fast.bind(mlp.module, mlp.forward_with(down))


def _put_looked_up(fast: FusedKernels, found: LookedUp) -> None:
    functions = found.replaced()
    if not functions:
        return
    own, changed = found.module.forward, found.forward_with(functions)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        return (changed if torch.is_grad_enabled() else own)(*arguments, **keywords)

    for name in functions:
        fast.counts[REPLACEMENTS[name].said] += 1
    fast.bind(found.module, forward)


def _norm_forward(module: Any, variant: Variant) -> Bound:
    own, eps = module.forward, eps_of(module)
    assert eps is not None, "a variant has it"

    def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if arguments or keywords or not torch.is_grad_enabled():
            return own(x, *arguments, **keywords)
        return rms_norm(x, module.weight, eps, variant)

    return forward
