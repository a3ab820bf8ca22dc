"""LoRA on the experts of a mixture: PEFT's wrappers around expert parameters, computed expert by expert.

PEFT adapts a 3-D parameter (`target_parameters`) by adding the low-rank change of all experts to their dequantised
weights, in every forward. Its modules stay in the tree, so that the adapter is stored, loaded and switched off as PEFT
does it; what the outermost wrapper of an experts module computes is replaced by `kernels.experts`, which applies the
change to the tokens and dequantises one expert at a time. Modules outside Transformers' interface for experts run their own
forward on dequantised weights with the change added.
"""

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from qlora_train.config import LoraSection
from qlora_train.kernels.expert_linear import experts_forward, follows_interface
from qlora_train.kernels.expert_weights import LowRankStack, quantized_experts
from qlora_train.models.moe import expert_parameters, stacks
from qlora_train.utils.errors import ConfigError

Wrapper = Any
"""A ParamWrapper of PEFT, whose attributes are not typed."""


def choose_expert_parameters(model: nn.Module, lora: LoraSection) -> list[str]:
    """Return PEFT's `target_parameters`: the full names of the expert stacks that carry LoRA, in the model's order.

    Raises:
        ConfigError: a name that matches no stack of experts, or a setting that PEFT has not for parameters.
    """
    known = list(expert_parameters(model))
    asked = lora.target_parameters
    if asked == "auto":
        chosen = known if lora.target_modules == "all-linear" else []
    else:
        unknown = [name for name in asked if not any(_ends_with(full, name) for full in known)]
        if unknown:
            has = ", ".join(sorted({full.rpartition(".")[2] for full in known})) or "no experts"
            raise ConfigError(
                f"lora.target_parameters: no stack of experts is called {', '.join(unknown)}; this model has {has}"
            )
        chosen = [full for full in known if any(_ends_with(full, name) for name in asked)]
    if chosen:
        _refuse_unsupported(lora)
    return chosen


def _ends_with(full_name: str, name: str) -> bool:
    return full_name == name or full_name.endswith(f".{name}")


def _refuse_unsupported(lora: LoraSection) -> None:
    settings = {
        "lora_dropout": lora.lora_dropout > 0,
        "use_dora": lora.use_dora,
        "init_lora_weights": lora.init_lora_weights == "eva",
    }
    problems = [
        f"lora.{key}: {getattr(lora, key)} is not there for the experts of a mixture; leave it at its default, or keep the "
        "experts as they are with lora.target_parameters: []"
        for key, is_set in settings.items()
        if is_set
    ]
    if problems:
        raise ConfigError(problems)


def bind_experts(model: nn.Module) -> None:
    """Make the wrappers of every experts module compute expert by expert, and nest as they would on a 16-bit base.

    PEFT nests the wrappers of plain parameters as the module defines them, and those of parametrised ones by name; the
    adapter's tensors are called by their depth, so that they would land on each other's parameter.
    """
    for parent, name, wrappers in list(_chains(model)):
        experts = wrappers[0].get_base_layer()
        defined = stacks(experts)
        ordered = sorted(wrappers, key=lambda wrapper: defined.index(wrapper.parameter_name))
        inner: nn.Module = experts
        for wrapper in ordered:
            wrapper.base_layer = inner
            inner = wrapper
        setattr(parent, name, inner)
        if follows_interface(experts):
            inner.forward = _expert_by_expert(experts, ordered)
        elif all(quantized_experts(experts, wrapper.parameter_name) for wrapper in ordered):
            inner.forward = _on_changed_weights(experts, ordered)


def _chains(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[Wrapper]]]:
    """Yield the parent and the name of each outermost wrapper, and the wrappers from there inwards."""
    for parent in model.modules():
        if isinstance(parent, ParamWrapper):
            continue
        for name, child in parent.named_children():
            wrappers: list[Wrapper] = []
            inner: Wrapper = child
            while isinstance(inner, ParamWrapper):
                wrappers.append(inner)
                inner = inner.base_layer
            if wrappers:
                yield parent, name, wrappers


def _expert_by_expert(experts: nn.Module, wrappers: list[Wrapper]) -> Any:
    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        changes = {wrapper.parameter_name: change for wrapper in wrappers for change in _change(wrapper)}
        return experts_forward(experts, hidden_states, top_k_index, top_k_weights, changes)

    return forward


def _on_changed_weights(experts: nn.Module, wrappers: list[Wrapper]) -> Any:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        held = {wrapper: quantized_experts(experts, wrapper.parameter_name) for wrapper in wrappers}
        weights = {wrapper: found[1] for wrapper, found in held.items() if found is not None}
        try:
            for wrapper, stack in weights.items():
                stack.change = next(_change(wrapper), None)
            return experts(*arguments, **keywords)
        finally:
            for stack in weights.values():
                stack.change = None

    return forward


def _change(wrapper: Wrapper) -> Iterator[LowRankStack]:
    """Yield the change of the active adapter, or nothing where adapters are switched off.

    PEFT stores `a` as (experts * r, in), experts outermost, and `b` as (out, r * experts), experts innermost.
    """
    assert not wrapper.merged, "an adapter is never merged into a live model"
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.disable_adapters or not active:
        return
    assert len(active) == 1, "one adapter at a time"
    a, b = wrapper.lora_A[active[0]].weight, wrapper.lora_B[active[0]].weight
    number = wrapper.num_experts
    yield LowRankStack(
        a=a.reshape(number, -1, a.shape[1]),
        b=b.reshape(b.shape[0], -1, number).permute(2, 0, 1),
        scale=wrapper.scaling[active[0]],
        transposed=not wrapper._did_swap_in_out_features,
    )
