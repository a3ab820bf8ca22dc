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
from qlora_train.data.batch_order import epoch_order
from qlora_train.data.collate import PaddingCollator, batches_with_labels, padding_multiple
from qlora_train.data.held_out_rows import RunRows
from qlora_train.data.token_store import Rows
from qlora_train.models import LoadedModel
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_BATCHES = 64
"""PEFT stops earlier when the components have converged."""
Batch = Mapping[str, torch.Tensor]
"""A training batch: `input_ids`, `attention_mask` and `labels`, each (batch, seq)."""


def eva_batches(loaded: LoadedModel, data: RunRows, rank: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return the first training batches of a run, each with labels enough for the rank."""
    assert isinstance(data.train, Rows), "the config refuses eva with a stream"
    order = epoch_order(data.train.lengths, seed=seed, epoch=0, batch_size=1, group_by_length=False)
    collate = PaddingCollator(loaded.tokenizer.pad_token_id, padding_multiple(loaded.device))
    return batches_with_labels(data.train, order, collate, min_labels=2 * rank, max_batches=MAX_BATCHES)


def eva_components(
    loaded: LoadedModel, config: LoraConfig, batches: Sequence[Batch], linears: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """Return the A matrices by layer: principal directions of the inputs on the base.

    Raises:
        ConfigError: the rank is too high for the width of a layer or for the labels of a batch.
    """
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

    logger.debug("adapter: eva initialization from %d batches", len(batches))
    components = get_eva_state_dict(
        loaded.model,
        [dict(batch) for batch in batches],
        config,
        forward_fn=forward,
        show_progress_bar=False,
        gather_distributed_inputs=False,  # every rank has the same batches
    )
    return {f"base_model.model.{name}": component for name, component in components.items()}


def _width(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else int(layer.get_parameter("weight").shape[0])
