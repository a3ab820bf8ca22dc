"""Choose the layers that carry the adapter by walking the model, so that a new architecture needs no list."""

import logging
import re
from collections.abc import Iterable, Mapping

from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_train.architectures import Architecture
from qlora_train.config import LoraSection
from qlora_train.kernels.expert_weights import ExpertWeights
from qlora_train.models.loading import output_heads
from qlora_train.models.moe import expert_parameters, routers
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return all linear layers except the output head by full name."""
    heads = output_heads(model)
    kinds = (nn.Linear, Linear4bit, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module not in heads}


def choose_targets(
    model: nn.Module, linears: Mapping[str, nn.Module], lora: LoraSection, architecture: Architecture
) -> list[str]:
    """Return PEFT's `target_modules`: short layer names, or full names where a short one would match more.

    Raises:
        ConfigError: a name or expression that matches no linear layer, or a layer that cannot carry an adapter.
    """
    targets = lora.target_modules
    if targets == "all-linear":
        return _every_layer(model, linears, architecture)
    short_names = sorted({name.rpartition(".")[2] for name in linears})
    if isinstance(targets, str):
        matched = [name for name in linears if re.fullmatch(targets, name)]
        if not matched:
            raise ConfigError(
                f"lora.target_modules: {targets!r} matches no linear layer; a full name is, for example, "
                f"{next(iter(linears))!r}, and the layers are {', '.join(short_names)}"
            )
        for name, module in model.named_modules():
            if module in output_heads(model) and re.fullmatch(targets, name):
                logger.warning(
                    "lora.target_modules: %r also matches the output head %s, which has no adapter; train it with "
                    "lora.modules_to_save", targets, name,
                )  # fmt: skip
        chosen = matched  # PEFT would also match the head, norms and blocks
    else:
        unknown = [name for name in targets if not any(is_target(full, [name]) for full in linears)]
        if unknown:
            raise ConfigError(
                f"lora.target_modules: no linear layer is called {', '.join(unknown)}; this model has "
                f"{', '.join(short_names)}"
            )
        chosen = sorted(targets)
    refused = _without_adapter(model, {name.rpartition(".")[2] for name in chosen}, architecture)
    if refused:
        name, reason = next(iter(refused.items()))
        raise ConfigError(f"lora.target_modules: {name} cannot carry an adapter: {reason}; leave it out")
    return chosen


def _every_layer(model: nn.Module, linears: Mapping[str, nn.Module], architecture: Architecture) -> list[str]:
    """Return the names for `all-linear`, without routers and layers that cannot carry an adapter (logged)."""
    router_names = routers(model)
    by_full_name = {name: name.rpartition(".")[2] for name in linears if name not in router_names}
    refused = _without_adapter(model, set(by_full_name.values()), architecture)
    for name, reason in refused.items():
        count = sum(short == name for short in by_full_name.values())
        logger.debug("adapter: none on %d layers called %s (%s)", count, name, reason)
    # a short name would also match the router or expert parameter of the same name
    shared = {name.rpartition(".")[2] for name in (*router_names, *expert_parameters(model))}
    chosen = {full if short in shared else short for full, short in by_full_name.items() if short not in refused}
    return sorted(chosen)


def _without_adapter(model: nn.Module, names: set[str], architecture: Architecture) -> dict[str, str]:
    """Return the short names of layers that cannot carry an adapter in this model, with the reason."""
    refused = {
        name: architecture.lora_unsupported_reason for name in sorted(names) if name in architecture.lora_unsupported
    }
    translated = [name for name in sorted(names) if _peft_maps_to_experts(model, name)]
    reason = "PEFT maps this name to experts, as for adapters of earlier Transformers versions"
    return refused | dict.fromkeys(translated, reason)


def _peft_maps_to_experts(model: nn.Module, name: str) -> bool:
    """Whether PEFT would replace a layer's name by an expert parameter, as it does for older adapters."""
    trial = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # half of a fused expert parameter
        return True
    return name not in trial.target_modules


def is_target(full_name: str, targets: Iterable[str]) -> bool:
    """Whether a name equals one of `targets`, or ends with one after a dot."""
    return any(full_name == target or full_name.endswith(f".{target}") for target in targets)


def choose_modules_to_save(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return full names for `modules_to_save`; PEFT alone would match every name with that ending.

    Raises:
        ConfigError: the model has no such module, or it is stored in 4 bits.
    """
    chosen: list[str] = []
    for name in names:
        matches = {full: module for full, module in model.named_modules() if is_target(full, [name])}
        if not matches:
            raise ConfigError(
                f"lora.modules_to_save: the model has no module {name!r}; common ones are lm_head, embed_tokens"
            )
        if any(
            isinstance(inner, Linear4bit | ExpertWeights) for module in matches.values() for inner in module.modules()
        ):
            raise ConfigError(
                f"lora.modules_to_save: {name!r} is stored in 4 bits and cannot be trained in full; drop it"
            )
        chosen += matches
    return chosen
