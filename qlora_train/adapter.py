"""The adapter: LoRA on every linear layer but the head, trained in float32 over the frozen 4-bit base.

Layers are found by walking the model, so a new architecture needs no list. Adapter weights are float32: bfloat16 would
round away small updates, and a resumed run would not be the same run.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from qlora_train.config import LoraSection
from qlora_train.config.schema import INITS
from qlora_train.errors import ConfigError
from qlora_train.loader import LoadedModel
from qlora_train.loader.model import output_heads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptedModel:
    """The base with its adapter: what trains, and how much of it there is."""

    model: PeftModel
    loaded: LoadedModel
    target_names: tuple[str, ...]
    num_trainable: int
    """Trainable parameters."""
    num_total: int
    """All parameters, 4-bit ones counted as the weights they stand for."""


def attach_adapter(loaded: LoadedModel, lora: LoraSection, *, seed: int) -> AdaptedModel:
    """Put a trainable adapter on a loaded model.

    Args:
        loaded: the frozen base.
        lora: rank, targets, initialisation, or the adapter to start from.
        seed: seed of the initialisation.

    Raises:
        ConfigError: targets that are not in the model, a module to save that is in 4 bits, or a warm start from an
            adapter that differs from the config.
    """
    linears = find_linears(loaded.model)
    _check_modules_to_save(loaded.model, lora.modules_to_save)
    set_seed(seed)
    if lora.adapter_path is None:
        targets = choose_targets(linears, lora)
        model = get_peft_model(loaded.model, _peft_config(loaded, lora, targets))
    else:
        model = _load_adapter(loaded, lora, Path(lora.adapter_path))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return _count(model, loaded)


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer but the output head, by full name."""
    heads = output_heads(model)
    kinds = (nn.Linear, Linear4bit, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module not in heads}


def choose_targets(linears: dict[str, nn.Module], lora: LoraSection) -> list[str] | str:
    """Return PEFT's `target_modules`: short layer names, or the user's regular expression.

    Raises:
        ConfigError: a name or expression that matches no linear layer.
    """
    short_names = sorted({name.rpartition(".")[2] for name in linears})
    asked = lora.target_modules
    if asked == "all-linear":
        return short_names
    if isinstance(asked, str):
        if not any(re.fullmatch(asked, name) for name in linears):
            raise ConfigError(
                f"lora.target_modules: {asked!r} matches no linear layer; a full name is, for example, "
                f"{next(iter(linears))!r}, and the layers are {', '.join(short_names)}"
            )
        return asked
    unknown = [name for name in asked if not any(_ends_with(full, name) for full in linears)]
    if unknown:
        raise ConfigError(
            f"lora.target_modules: no linear layer is called {', '.join(unknown)}; this model has {', '.join(short_names)}"
        )
    return sorted(asked)


def _ends_with(full_name: str, name: str) -> bool:
    return full_name == name or full_name.endswith(f".{name}")


def _check_modules_to_save(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        matches = [module for full, module in model.named_modules() if _ends_with(full, name)]
        if not matches:
            raise ConfigError(
                f"lora.modules_to_save: the model has no module {name!r}; usual are lm_head, embed_tokens"
            )
        if any(isinstance(inner, Linear4bit) for module in matches for inner in module.modules()):
            raise ConfigError(
                f"lora.modules_to_save: {name!r} is stored in 4 bits and cannot be trained in full; drop it"
            )


def _peft_config(loaded: LoadedModel, lora: LoraSection, targets: list[str] | str) -> LoraConfig:
    tokenizer = loaded.tokenizer
    new_rows = list(range(len(tokenizer) - loaded.num_new_tokens, len(tokenizer))) if loaded.num_new_tokens else None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias=lora.bias,
        init_lora_weights=INITS[lora.init_lora_weights],
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=new_rows,
    )


def _load_adapter(loaded: LoadedModel, lora: LoraSection, folder: Path) -> PeftModel:
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"lora.adapter_path: {folder} holds no adapter_config.json; give a folder written by PEFT")
    stored = PeftConfig.from_pretrained(str(folder))
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "bias")
    wrong = [
        f"lora.{key}: {getattr(lora, key)}, but the adapter in {folder} has {getattr(stored, key)}; set it to that"
        for key in keys
        if getattr(stored, key) != getattr(lora, key)
    ]
    if wrong:
        raise ConfigError(wrong)
    logger.info("adapter: starts from %s", folder)
    return PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=True, local_files_only=True)


def _count(model: PeftModel, loaded: LoadedModel) -> AdaptedModel:
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(
        parameter.quant_state.shape.numel() if isinstance(parameter, Params4bit) else parameter.numel()
        for parameter in model.parameters()
        if not parameter.requires_grad
    )
    names = tuple(
        sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)})
    )
    total = frozen + trainable
    logger.info(
        "adapter: %s trainable parameters (%.2f %% of %s) in %s, float32",
        f"{trainable:,}", 100 * trainable / total, f"{total:,}", ", ".join(names),
    )  # fmt: skip
    return AdaptedModel(model, loaded, names, trainable, total)


def trainable_state(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(loaded: LoadedModel, folder: Path) -> PeftModel:
    """Put a finished adapter on a loaded base, for inference."""
    model = PeftModel.from_pretrained(loaded.model, str(folder), local_files_only=True)
    model.eval()
    return model
