"""Adapters that are on disk already: the start of a run (`lora.adapter_path`), or its result."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qlora_train.adapters.adapter_folder import ADAPTER_WEIGHTS, AdapterSettings, read_settings, unreadable
from qlora_train.adapters.expert_lora import bind_experts
from qlora_train.adapters.precision import find_non_finite, train_in_float32
from qlora_train.adapters.targets import choose_modules_to_save, is_target
from qlora_train.config import LoraSection
from qlora_train.models import LoadedModel
from qlora_train.models.moe import expert_parameters
from qlora_train.utils.errors import ConfigError, first_line

logger = logging.getLogger(__name__)


def warm_start(
    loaded: LoadedModel, lora: LoraSection, config: LoraConfig, linears: Mapping[str, nn.Module]
) -> PeftModel:
    """Put the adapter of `lora.adapter_path` on the base, bit for bit, when it is of the kind that the config says."""
    folder = Path(str(lora.adapter_path))
    stored, weights = _read(folder, loaded, "lora.adapter_path: ")
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "bias")
    wrong = [
        f"lora.{key}: {getattr(config, key)}, but the adapter in {folder} has {getattr(stored, key)}; set it to that"
        for key in keys
        if getattr(stored, key) != getattr(config, key)
    ]
    saved = choose_modules_to_save(loaded.model, stored.modules_to_save or ())
    if sorted(saved) != sorted(config.modules_to_save or ()):
        wrong.append(f"lora.modules_to_save: the adapter in {folder} has [{', '.join(saved)}]; set it to that")
    if sorted(stored.target_parameters or ()) != sorted(config.target_parameters or ()):
        experts = sorted({name.rpartition(".")[2] for name in stored.target_parameters or ()})
        wrong.append(f"lora.target_parameters: the adapter in {folder} has [{', '.join(experts)}]; set it to that")
    if wrong:
        raise ConfigError(wrong)
    modules_of_experts = {name.rpartition(".")[0] for name in config.target_parameters or ()}
    asked = {name for name in linears if is_target(name, config.target_modules)}
    found = {name.removeprefix("base_model.model.").partition(".lora_A")[0] for name in weights if ".lora_A" in name}
    found = {name for name in found if name.removesuffix(".base_layer") not in modules_of_experts}
    if asked != found:
        short = sorted({name.rpartition(".")[2] for name in found})
        raise ConfigError(
            f"lora.target_modules: {len(asked)} layers, but the adapter in {folder} is on {len(found)} others or fewer, "
            f"called {', '.join(short)}; set it to those, with the same base model"
        )
    logger.info("adapter: starts from %s", folder)
    return _with_weights(loaded, config, weights, f"lora.adapter_path: {folder}")


def load_trained(loaded: LoadedModel, folder: Path) -> PeftModel:
    """Put a finished adapter on a loaded base, for inference.

    Raises:
        ConfigError: the adapter cannot be read, or does not fit the base.
    """
    stored, weights = _read(folder, loaded, "")
    model = _with_weights(loaded, stored.peft_config(folder), weights, str(folder))
    model.requires_grad_(False)
    model.eval()
    return model


def _with_weights(loaded: LoadedModel, config: LoraConfig, weights: dict[str, torch.Tensor], where: str) -> PeftModel:
    """Return the base with an adapter of these float32 weights.

    PEFT's own loading would round modules that are trained in full to the dtype of the base.

    Raises:
        ConfigError: the tensors are not those of an adapter of this config on this base.
    """
    config.inference_mode = False
    model = get_peft_model(loaded.model, config)
    bind_experts(model)
    train_in_float32(model, loaded.compute_dtype)
    live = {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    given = {name: tensor.shape for name, tensor in weights.items()}
    different = sorted(name for name in live.keys() | given.keys() if live.get(name) != given.get(name))
    if different:
        name = different[0]
        raise ConfigError(
            f"{where}: does not fit the base model: {len(different)} tensors differ, e.g. {name} has shape "
            f"{_shape(given.get(name))} there and {_shape(live.get(name))} here; use the base, model.new_tokens and lora "
            "settings that it was trained with"
        )
    set_peft_model_state_dict(model, weights)
    return model


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))


def _read(folder: Path, loaded: LoadedModel, where: str) -> tuple[AdapterSettings, dict[str, torch.Tensor]]:
    settings = read_settings(folder, loaded.source, where)
    settings.check_token_rows(folder, loaded.new_token_ids, where)
    settings.check_experts(folder, expert_parameters(loaded.model), where)
    file = folder / ADAPTER_WEIGHTS
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise unreadable(where, folder, first_line(error)) from None
    problem = find_non_finite(weights)
    if problem is not None:
        raise ConfigError(f"{where}{folder}: {file.name}: {problem}; give an adapter whose training did not break")
    return settings, weights
