"""Put a trainable adapter on a loaded model."""

import logging
from dataclasses import dataclass

from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import set_seed

from qlora_train.adapters.expert_lora import choose_expert_parameters
from qlora_train.adapters.load import trainable_model, warm_start
from qlora_train.adapters.targets import choose_modules_to_save, choose_targets, find_linears
from qlora_train.config import LoraSection
from qlora_train.config.schema import INITS
from qlora_train.data.held_out_rows import RunRows
from qlora_train.kernels.fsdp_units import gathered, is_sharded, is_sharded_tensor
from qlora_train.models import LoadedModel
from qlora_train.models.loading import output_heads
from qlora_train.models.quantization_summary import count_frozen_weights
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptedModel:
    """A base with its adapter, and its numbers of parameters."""

    model: PeftModel
    loaded: LoadedModel
    num_trainable: int
    num_total: int
    """Of weights, not of packed 4-bit elements."""


def attach_adapter(loaded: LoadedModel, lora: LoraSection, *, seed: int, data: RunRows | None = None) -> AdaptedModel:
    """Put a trainable adapter on a loaded model.

    Args:
        seed: of the initialization.
        data: for `init_lora_weights: eva`; None if a checkpoint replaces the initial weights.

    Raises:
        ConfigError: unknown targets, a module to save in 4 bits, or a warm start from an adapter of another kind.
    """
    linears = find_linears(loaded.model)
    targets = choose_targets(loaded.model, linears, lora, loaded.architecture)
    config = _peft_config(loaded, lora, targets)
    set_seed(seed)
    if lora.adapter_path is not None:
        model = warm_start(loaded, lora, config)
    else:
        components = {}
        if lora.init_lora_weights == "eva" and data is not None:
            from qlora_train.adapters.eva import eva_batches, eva_components

            components = eva_components(loaded, config, eva_batches(loaded, data, lora.r, seed), linears)
        model = trainable_model(loaded, config)
        if components:
            initialize_lora_eva_weights(model, eva_state_dict=components)
    return _counted(model, loaded)


def _peft_config(loaded: LoadedModel, lora: LoraSection, targets: list[str]) -> LoraConfig:
    modules_to_save = choose_modules_to_save(loaded.model, lora.modules_to_save)
    _check_sharded(loaded.model, lora, modules_to_save)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        # short names would also match in the encoders of the whole multimodal model
        exclude_modules="|".join(module.pattern for module in loaded.omitted_modules) or None,
        target_parameters=choose_expert_parameters(loaded.model, lora) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias=lora.bias,
        init_lora_weights=INITS[lora.init_lora_weights],
        # rho 1: every layer has rank r, so that trainable parameters, memory and checkpoints are as configured
        eva_config=EvaConfig(rho=1.0) if lora.init_lora_weights == "eva" else None,
        modules_to_save=modules_to_save or None,
        trainable_token_indices=_trained_rows(loaded, modules_to_save),
    )


def _check_sharded(model: nn.Module, lora: LoraSection, modules_to_save: list[str]) -> None:
    """Refuse adapters that copy weights of a layer, of which each rank has a part.

    Raises:
        ConfigError: DoRA, or a matrix of a decoder layer that is trained in full.
    """
    if not is_sharded(model):
        return
    if lora.use_dora:
        raise ConfigError(
            "lora.use_dora: true reads whole weights to start from, and parallel.strategy: fsdp shards them; set it to "
            "false, or set parallel.strategy: ddp"
        )
    with gathered(model):
        inside = [
            name for name in modules_to_save if any(map(is_sharded_tensor, model.get_submodule(name).parameters()))
        ]
    if inside:
        raise ConfigError(
            f"lora.modules_to_save: {inside[0]} is a matrix of a decoder layer, which parallel.strategy: fsdp shards; "
            "allowed are embeddings, the output head and norms; or set parallel.strategy: ddp"
        )


def _trained_rows(loaded: LoadedModel, modules_to_save: list[str]) -> dict[str, list[int]] | None:
    """Return the new token rows to train by module: the embedding's, and an untied head's."""
    if not loaded.new_token_ids:
        return None
    embedding = loaded.model.get_input_embeddings()
    vocabulary = {embedding, *output_heads(loaded.model)}
    names = {module: name for name, module in loaded.model.named_modules() if module in vocabulary}
    in_full = {module for module, name in names.items() if name in modules_to_save}
    own_rows = {module for module in names if module is embedding or module.weight is not embedding.weight}
    if embedding in in_full and vocabulary - own_rows - in_full:
        raise ConfigError(
            f"lora.modules_to_save: {names[embedding]} is tied to the output head, which would not train the rows of "
            "model.new_tokens; add lm_head, or drop it"
        )
    rows = {names[module].rpartition(".")[2]: list(loaded.new_token_ids) for module in own_rows - in_full}
    return dict(sorted(rows.items())) or None


def _counted(model: PeftModel, loaded: LoadedModel) -> AdaptedModel:
    trainable = sum(parameter.numel() for parameter in trainable_state(model).values())
    frozen = count_frozen_weights(model)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    share = 100 * trainable / (frozen + trainable)
    logger.info("adapter: %s trainable parameters (%.2f %% of %s)", f"{trainable:,}", share, f"{frozen + trainable:,}")
    logger.debug("adapter: in %s, float32", ", ".join(sorted(names)))
    return AdaptedModel(model, loaded, trainable, frozen + trainable)


def trainable_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
