"""Load adapters from disk: to start a run from (`lora.adapter_path`), or for inference."""

import logging
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from qlora_train.adapters.adapter_folder import (
    ADAPTER_CONFIG,
    AdapterSettings,
    read_adapter_settings,
    read_adapter_weights,
    shorten,
)
from qlora_train.adapters.expert_lora import bind_experts
from qlora_train.adapters.precision import train_in_float32
from qlora_train.adapters.targets import choose_modules_to_save
from qlora_train.config import LoraSection
from qlora_train.kernels.fsdp_units import gathered
from qlora_train.models import LoadedModel
from qlora_train.models.moe import expert_parameters
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def warm_start(loaded: LoadedModel, lora: LoraSection, config: LoraConfig) -> PeftModel:
    """Put the adapter of `lora.adapter_path` on the base, bit for bit.

    Raises:
        ConfigError: its settings differ from `config`, or its tensors from the model's.
    """
    folder = Path(str(lora.adapter_path))
    stored, weights = _read(folder, loaded, "lora.adapter_path: ")
    wrong = [
        f"lora.{key}: {getattr(config, key)}, but the adapter in {folder} has {getattr(stored, key)}; set it to that"
        for key in ("r", "lora_alpha", "use_rslora", "use_dora", "bias")
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
    logger.info("adapter: starts from %s", folder)
    return _with_weights(loaded, config, weights, f"lora.adapter_path: {folder}")


def load_trained(loaded: LoadedModel, folder: Path) -> PeftModel:
    """Put a finished adapter on a loaded base, frozen and in eval mode.

    Raises:
        ConfigError: the adapter cannot be read, or does not fit the base.
    """
    stored, weights = _read(folder, loaded, "")
    model = _with_weights(loaded, stored.peft_config(folder), weights, str(folder))
    return model.requires_grad_(False).eval()


def trainable_model(loaded: LoadedModel, config: LoraConfig) -> PeftModel:
    """Put a new adapter on a loaded base."""
    with gathered(loaded.model):  # rows of new tokens and modules trained in full are copies of weights
        model = get_peft_model(loaded.model, config)
    bind_experts(model)
    train_in_float32(model, loaded.compute_dtype)
    return model


def _with_weights(loaded: LoadedModel, config: LoraConfig, weights: dict[str, torch.Tensor], where: str) -> PeftModel:
    # PEFT's from_pretrained would round modules that are trained in full to the dtype of the base
    config.inference_mode = False
    model = trainable_model(loaded, config)
    expected = {name: t.shape for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    actual = {name: t.shape for name, t in weights.items()}
    different = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if different:
        name = different[0]
        raise ConfigError(
            f"{where}: does not fit the base model: {len(different)} tensors differ, e.g. {name} has shape "
            f"{_shape(actual.get(name))} in the adapter and {_shape(expected.get(name))} in the model; use the base, "
            "model.new_tokens and lora settings that it was trained with"
        )
    set_peft_model_state_dict(model, weights)
    return model


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))


def _read(folder: Path, loaded: LoadedModel, where: str) -> tuple[AdapterSettings, dict[str, torch.Tensor]]:
    settings = read_adapter_settings(folder, loaded.source, where)
    if other_rows := sorted(settings.token_ids() - set(loaded.new_token_ids)):
        raise ConfigError(
            f"{where}{folder / ADAPTER_CONFIG}: trainable_token_indices: row {other_rows[0]} is not one of "
            "model.new_tokens; set the new tokens that the adapter was trained with"
        )
    if others := sorted(set(settings.target_parameters or ()) - expert_parameters(loaded.model).keys()):
        raise ConfigError(
            f"{where}{folder / ADAPTER_CONFIG}: target_parameters: {shorten(others[0])} is no expert parameter of the base "
            "model; use the base that the adapter was trained on"
        )
    return settings, read_adapter_weights(folder, where)
