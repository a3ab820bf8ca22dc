"""Fused kernels on the instances of a loaded model.

Which kernel applies is decided by recording a forward pass and by trying modules on random inputs, not by names of
architectures. PEFT's modules stay in the tree: their forward is bound on the instance. It computes only if
`fused_kernels_apply` and passes everything else (evaluation, a disabled or merged adapter, further arguments) to the
module's own forward.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.kernels.fsdp_units import gathering_modules
from qlora_train.kernels.function_overrides import OVERRIDES, FunctionOverrides
from qlora_train.kernels.fused_mlp import GatedMlp
from qlora_train.kernels.fused_mode import fused_kernels_apply
from qlora_train.kernels.lora_dropout import lora_dropout_off
from qlora_train.kernels.ops.rms_norm import Variant, eps_of, find_variant, rms_norm
from qlora_train.kernels.shared_input import InputGroup, InputRecorder

Forward = Callable[..., Any]


@dataclass
class FusedKernels:
    """The kernels on a model.

    Attributes:
        counts: modules by operation.
        skipped: adapted layers that compute as in PEFT, by reason.
        weights: of the adapted layers, in the order of the model.
        mlps: fused with their down projection.
        hooks: on the model.
    """

    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    weights: list[FrozenWeight] = field(default_factory=list)
    mlps: list[GatedMlp] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    _bound: list[nn.Module] = field(default_factory=list)

    def summary(self) -> str:
        parts = [f"{count} {operation}" for operation, count in self.counts.items()]
        parts += [f"{count} adapted layers as in PEFT ({reason})" for reason, count in self.skipped.items()]
        return ", ".join(parts) or "none applies to this model"

    def bind(self, module: nn.Module, forward: Forward) -> None:
        """Bind a forward to a module instance."""
        assert "forward" not in vars(module), "already bound"
        module.forward = forward
        self._bound.append(module)

    def uninstall(self) -> None:
        """Restore the forward of every module."""
        for module in self._bound:
            del module.forward
        for hook in self.hooks:
            hook.remove()
        self._bound.clear()
        self.hooks.clear()


def install(model: nn.Module, run: Callable[[], Any]) -> FusedKernels:
    """Install every kernel that applies.

    Args:
        run: computes a few tokens with it.
    """
    recorder = InputRecorder(model)
    overrides = [FunctionOverrides(module) for module in model.modules()]
    with ExitStack() as recording, torch.no_grad():
        recording.enter_context(recorder.recording())
        for override in overrides:
            recording.enter_context(override.recording())
        run()
    kernels = FusedKernels(skipped=recorder.skipped)
    norms = [(module, variant) for module in model.modules() if (variant := find_variant(module)) is not None]
    with lora_dropout_off(recorder.layers):
        mlps = [mlp for module in gathering_modules(model) if (mlp := GatedMlp.find(module)) is not None]
    groups = recorder.groups()
    _bind_linears(kernels, model, groups)
    _bind_mlps(kernels, groups, mlps)
    for module, variant in norms:
        kernels.counts["RMS norms"] += 1
        kernels.bind(module, _norm_forward(module, variant))
    for override in overrides:
        operations = override.operations()
        kernels.counts.update(OVERRIDES[name][0] for name in operations)
        if operations:
            kernels.bind(override.module, override.forward())
    return kernels


def _bind_linears(kernels: FusedKernels, model: nn.Module, groups: list[InputGroup]) -> None:
    for group in groups:
        kernels.weights += group.weights
        kernels.counts["adapted linear layers"] += len(group.layers)
        kernels.counts["groups of them that read the same input"] += len(group.layers) > 1
        for index, layer in enumerate(group.layers):
            kernels.bind(layer, group.forward_of(index))

    def clear(_model: nn.Module, _inputs: Any) -> None:
        for group in groups:
            group.clear()

    kernels.hooks.append(model.register_forward_pre_hook(clear))


def _bind_mlps(kernels: FusedKernels, groups: list[InputGroup], mlps: list[GatedMlp]) -> None:
    single = {group.layers[0]: group for group in groups if len(group.layers) == 1}
    for mlp in mlps:
        down = single.get(mlp.module.down_proj)
        if down is not None:
            kernels.counts["gated MLPs"] += 1
            kernels.mlps.append(mlp)
            kernels.bind(mlp.module, mlp.forward_with(down))


def _norm_forward(module: Any, variant: Variant) -> Forward:
    own, eps = module.forward, eps_of(module)
    assert eps is not None, "set for every variant"

    def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if arguments or keywords or not fused_kernels_apply():
            return own(x, *arguments, **keywords)
        return rms_norm(x, module.weight, eps, variant)

    return forward
