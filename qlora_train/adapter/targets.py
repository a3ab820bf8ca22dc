"""Which layers carry the adapter: found by walking the model, so that a new architecture needs no list."""

import re
from collections.abc import Iterable

from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_train.config import LoraSection
from qlora_train.errors import ConfigError
from qlora_train.loader.model import output_heads


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer but the output head, by full name."""
    heads = output_heads(model)
    kinds = (nn.Linear, Linear4bit, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module not in heads}


def choose_targets(linears: dict[str, nn.Module], lora: LoraSection) -> list[str]:
    """Return PEFT's `target_modules`: short layer names, or the full names that the user's regular expression matches.

    Raises:
        ConfigError: a name or expression that matches no linear layer.
    """
    short_names = sorted({name.rpartition(".")[2] for name in linears})
    asked = lora.target_modules
    if asked == "all-linear":
        return short_names
    if isinstance(asked, str):
        matched = [name for name in linears if re.fullmatch(asked, name)]
        if not matched:
            raise ConfigError(
                f"lora.target_modules: {asked!r} matches no linear layer; a full name is, for example, "
                f"{next(iter(linears))!r}, and the layers are {', '.join(short_names)}"
            )
        return matched  # PEFT would apply the expression to the head, norms and blocks too
    unknown = [name for name in asked if not any(_ends_with(full, name) for full in linears)]
    if unknown:
        raise ConfigError(
            f"lora.target_modules: no linear layer is called {', '.join(unknown)}; this model has {', '.join(short_names)}"
        )
    return sorted(asked)


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
        if any(isinstance(inner, Linear4bit) for module in matches.values() for inner in module.modules()):
            raise ConfigError(
                f"lora.modules_to_save: {name!r} is stored in 4 bits and cannot be trained in full; drop it"
            )
        chosen += matches
    return chosen
