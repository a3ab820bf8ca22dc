"""EVA initialization (Paissan et al. 2024, https://arxiv.org/abs/2410.07170), computed by PEFT.

Ranks are not redistributed between layers.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_eva_state_dict
from torch import nn

from qlora_train.adapters.targets import is_target
from qlora_train.models import LoadedModel
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]
"""A training batch: `input_ids`, `attention_mask` and `labels`, each (batch, seq)."""


def eva_components(
    loaded: LoadedModel, config: LoraConfig, batches: Sequence[Batch], linears: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """Return the A matrices by layer: principal directions of the inputs on the base; empty without batches.

    Raises:
        ConfigError: the rank is too high for the width of a layer or for the labels of a batch.
    """
    if not batches:
        return {}
    needed = 2 * config.r  # the randomized SVD oversamples by a factor of 2
    width = min(_width(layer) for name, layer in linears.items() if is_target(name, config.target_modules))
    num_labels = min(int((batch["labels"] != config.eva_config.label_mask_value).sum()) for batch in batches)
    if needed > min(width, num_labels):
        raise ConfigError(
            f"lora.init_lora_weights: eva with lora.r {config.r} needs at least {needed} inputs per layer and label "
            f"tokens per batch; found {width} and {num_labels}; lower lora.r, or use default"
        )

    def forward(model: Any, batch: Batch) -> None:  # the logits are not needed
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    logger.info("adapter: eva initialization from %d batches", len(batches))
    components = get_eva_state_dict(
        loaded.model, [dict(batch) for batch in batches], config, forward_fn=forward, show_progress_bar=False
    )
    return {f"base_model.model.{name}": component for name, component in components.items()}


def _width(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else int(layer.get_parameter("weight").shape[0])
