"""Which layers carry the adapter: found by walking the model, so that a new architecture needs no list."""

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
    """Return every linear layer but the output head, by full name."""
    heads = output_heads(model)
    kinds = (nn.Linear, Linear4bit, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module not in heads}


def choose_targets(
    model: nn.Module, linears: Mapping[str, nn.Module], lora: LoraSection, architecture: Architecture
) -> list[str]:
    """Return PEFT's `target_modules`: short layer names, or full ones where a short name would take more.

    Args:
        model: the base, for which PEFT translates names of layers that were experts once.
        linears: from `find_linears`.
        lora: what the user asks for.
        architecture: the base's row.

    Raises:
        ConfigError: a name or expression that matches no linear layer, or only layers that cannot carry an adapter.
    """
    asked = lora.target_modules
    if asked == "all-linear":
        return _every_layer(model, linears, architecture)
    short_names = sorted({name.rpartition(".")[2] for name in linears})
    if isinstance(asked, str):
        matched = [name for name in linears if re.fullmatch(asked, name)]
        if not matched:
            raise ConfigError(
                f"lora.target_modules: {asked!r} matches no linear layer; a full name is, for example, "
                f"{next(iter(linears))!r}, and the layers are {', '.join(short_names)}"
            )
        for name, module in model.named_modules():
            if module in output_heads(model) and re.fullmatch(asked, name):
                logger.warning(
                    "lora.target_modules: %r matches the output head %s too, which carries no adapter; train it with "
                    "lora.modules_to_save", asked, name,
                )  # fmt: skip
        chosen = matched  # PEFT would apply the expression to the head, norms and blocks too
    else:
        unknown = [name for name in asked if not any(_ends_with(full, name) for full in linears)]
        if unknown:
            raise ConfigError(
                f"lora.target_modules: no linear layer is called {', '.join(unknown)}; this model has "
                f"{', '.join(short_names)}"
            )
        chosen = sorted(asked)
    refused = _without_adapter(model, {name.rpartition(".")[2] for name in chosen}, architecture)
    if refused:
        name, reason = next(iter(refused.items()))
        raise ConfigError(f"lora.target_modules: {name} cannot carry an adapter: {reason}; leave it out")
    return chosen


def _every_layer(model: nn.Module, linears: Mapping[str, nn.Module], architecture: Architecture) -> list[str]:
    """Return the names for `all-linear`: no router of a mixture, and no layer that cannot carry an adapter (logged)."""
    beside = routers(model)
    by_full_name = {name: name.rpartition(".")[2] for name in linears if name not in beside}
    refused = _without_adapter(model, set(by_full_name.values()), architecture)
    for name, reason in refused.items():
        count = sum(short == name for short in by_full_name.values())
        logger.info("adapter: none on the %d layers called %s: %s", count, name, reason)
    # a short name would take the router, or the parameter of experts, of the same name
    shared = {name.rpartition(".")[2] for name in (*beside, *expert_parameters(model))}
    chosen = {full if short in shared else short for full, short in by_full_name.items() if short not in refused}
    return sorted(chosen)


def _without_adapter(model: nn.Module, names: set[str], architecture: Architecture) -> dict[str, str]:
    """Return those of the short names that PEFT cannot put an adapter on in this model, with the reason."""
    refused = {
        name: architecture.lora_unsupported_reason for name in sorted(names) if name in architecture.lora_unsupported
    }
    translated = [name for name in sorted(names) if _peft_takes_for_experts(model, name)]
    reason = "PEFT takes this name for the experts that earlier versions of Transformers kept as layers"
    return refused | dict.fromkeys(translated, reason)


def _peft_takes_for_experts(model: nn.Module, name: str) -> bool:
    """Say whether PEFT would replace a layer's name by a parameter of the experts, as it does for older adapters."""
    trial = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # a half of what became one parameter
        return True
    return name not in trial.target_modules


def is_target(full_name: str, targets: Iterable[str]) -> bool:
    return any(_ends_with(full_name, target) for target in targets)


def _ends_with(full_name: str, name: str) -> bool:
    return full_name == name or full_name.endswith(f".{name}")


def choose_modules_to_save(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the full names of the modules to train in full; PEFT alone would take every name that merely ends so.

    Raises:
        ConfigError: the model has no such module, or it is stored in 4 bits.
    """
    chosen: list[str] = []
    for name in names:
        matches = {full: module for full, module in model.named_modules() if _ends_with(full, name)}
        if not matches:
            raise ConfigError(
                f"lora.modules_to_save: the model has no module {name!r}; usual are lm_head, embed_tokens"
            )
        if any(
            isinstance(inner, Linear4bit | ExpertWeights) for module in matches.values() for inner in module.modules()
        ):
            raise ConfigError(
                f"lora.modules_to_save: {name!r} is stored in 4 bits and cannot be trained in full; drop it"
            )
        chosen += matches
    return chosen
