"""LoRA on expert parameters: PEFT's ParamWrappers, computed expert by expert.

PEFT adds the low-rank updates of all experts to their dequantized weights in every forward. Its modules stay in the model,
so that PEFT stores, loads and disables the adapter. The forward of the outermost wrapper is replaced by
`kernels.expert_linear`, which applies the update to the tokens and dequantizes one expert at a time. Modules outside
Transformers' experts interface run their own forward on dequantized weights with the update added.
"""

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from qlora_train.adapters.targets import is_target
from qlora_train.config import LoraSection
from qlora_train.kernels.expert_linear import experts_forward, follows_interface
from qlora_train.kernels.expert_weights import ExpertLora, quantized_experts
from qlora_train.models.moe import expert_parameters, stacks
from qlora_train.utils.errors import ConfigError

Wrapper = Any
"""A ParamWrapper of PEFT, whose attributes are not typed."""


def choose_expert_parameters(model: nn.Module, lora: LoraSection) -> list[str]:
    """Return PEFT's `target_parameters`: full names of the expert parameters that carry LoRA, in the model's order.

    Raises:
        ConfigError: a name that matches no expert parameter, or a setting that PEFT does not support for parameters.
    """
    known = list(expert_parameters(model))
    if lora.target_parameters == "auto":
        chosen = known if lora.target_modules == "all-linear" else []
    else:
        names = lora.target_parameters
        if unknown := [name for name in names if not any(is_target(full, [name]) for full in known)]:
            available = ", ".join(sorted({full.rpartition(".")[2] for full in known})) or "no experts"
            raise ConfigError(
                f"lora.target_parameters: no expert parameter is called {', '.join(unknown)}; this model has {available}"
            )
        chosen = [full for full in known if is_target(full, names)]
    unsupported = {
        "lora_dropout": lora.lora_dropout > 0,
        "use_dora": lora.use_dora,
        "init_lora_weights": lora.init_lora_weights == "eva",
    }
    problems = [
        f"lora.{key}: {getattr(lora, key)} is not supported for experts; use the default, or no LoRA on the experts: "
        "lora.target_parameters: []"
        for key, is_set in unsupported.items()
        if is_set
    ]
    if chosen and problems:
        raise ConfigError(problems)
    return chosen


def bind_experts(model: nn.Module) -> None:
    """Replace the forward of every experts module's outermost wrapper, and nest the wrappers as on a 16-bit base."""
    # PEFT nests wrappers of plain parameters in definition order and those of parametrized ones by name. Adapter
    # tensors are named by nesting depth, so that they would be loaded into each other's parameter.
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
            inner.forward = _per_expert_forward(experts, ordered)
        elif all(quantized_experts(experts, wrapper.parameter_name) for wrapper in ordered):
            inner.forward = _updated_weights_forward(experts, ordered)


def _chains(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[Wrapper]]]:
    """Yield parent and name of each outermost wrapper, and its wrappers from the outside in."""
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


def _per_expert_forward(experts: nn.Module, wrappers: list[Wrapper]) -> Any:
    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        updates = {wrapper.parameter_name: update for wrapper in wrappers for update in _update(wrapper)}
        return experts_forward(experts, hidden_states, top_k_index, top_k_weights, updates)

    return forward


def _updated_weights_forward(experts: nn.Module, wrappers: list[Wrapper]) -> Any:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        stacks_of = {wrapper: quantized_experts(experts, wrapper.parameter_name) for wrapper in wrappers}
        weights = {wrapper: found[1] for wrapper, found in stacks_of.items() if found is not None}
        try:
            for wrapper, stack in weights.items():
                stack.lora = next(_update(wrapper), None)
            return experts(*arguments, **keywords)
        finally:
            for stack in weights.values():
                stack.lora = None

    return forward


def _update(wrapper: Wrapper) -> Iterator[ExpertLora]:
    """Yield the update of the active adapter, or nothing if adapters are disabled.

    PEFT stores `a` as (experts * r, in), experts outermost, and `b` as (out, r * experts), experts innermost.
    """
    assert not wrapper.merged, "an adapter is never merged into a live model"
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.disable_adapters or not active:
        return
    assert len(active) == 1, "one adapter at a time"
    a, b = wrapper.lora_A[active[0]].weight, wrapper.lora_B[active[0]].weight
    number = wrapper.num_experts
    yield ExpertLora(
        a=a.reshape(number, -1, a.shape[1]),
        b=b.reshape(b.shape[0], -1, number).permute(2, 0, 1),
        scale=wrapper.scaling[active[0]],
        transposed=not wrapper._did_swap_in_out_features,
    )
