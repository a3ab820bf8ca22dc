"""Dequantized weight cache: 4-bit weights in the compute dtype, as many as a memory budget holds. Values are the same."""

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.parallel import context
from qlora_train.utils.constants import CACHE_SHARE
from qlora_train.utils.host_memory import available_bytes

logger = logging.getLogger(__name__)


def fill_cache(weights: Sequence[FrozenWeight], budget_gb: Literal["auto"] | float, device: torch.device) -> None:
    """Cache weights, in the order of the model, as long as they fit into `train.dequantized_cache_gb`."""
    if any(weight.is_sharded for weight in weights):
        logger.debug("dequantized cache: off (FSDP holds a part of each weight per rank)")
        return
    free_bytes = budget_bytes(budget_gb, device)
    quantized = [weight for weight in weights if weight.is_quantized]
    num_cached, cached_bytes = 0, 0
    for weight in quantized:
        if weight.dequantized_bytes <= free_bytes - cached_bytes:
            weight.cache()
            num_cached, cached_bytes = num_cached + 1, cached_bytes + weight.dequantized_bytes
    if num_cached:
        logger.debug(
            "dequantized cache: %d of %d weights, %.2f GB (train.dequantized_cache_gb: %s)",
            num_cached, len(quantized), cached_bytes / 1e9, budget_gb,
        )  # fmt: skip


def budget_bytes(budget_gb: Literal["auto"] | float, device: torch.device) -> float:
    """Return the bytes that `train.dequantized_cache_gb` allows on a device."""
    if budget_gb != "auto":
        return budget_gb * 1e9
    return CACHE_SHARE * available_bytes() / context().local_world_size if device.type == "cpu" else 0.0
