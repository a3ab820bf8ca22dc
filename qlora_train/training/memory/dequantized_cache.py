"""Copies of 4-bit weights in the compute dtype, as many as the memory for them holds: the numbers are the same."""

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from qlora_train.kernels.frozen_weight import FrozenWeight
from qlora_train.utils.host_memory import available_bytes

logger = logging.getLogger(__name__)

SHARE_OF_FREE_MEMORY = 0.25
"""What `auto` takes of a CPU's free memory."""


def fill_cache(weights: Sequence[FrozenWeight], budget_gb: Literal["auto"] | float, device: torch.device) -> None:
    """Keep copies of weights, in the order of the model, while they fit into the budget.

    Args:
        weights: of the layers that read them.
        budget_gb: `train.dequantized_cache_gb`.
        device: where they are.
    """
    left = _budget_bytes(budget_gb, device)
    kept = kept_bytes = 0
    quantized = [weight for weight in weights if weight.is_quantized]
    for weight in quantized:
        if weight.dequantized_bytes <= left - kept_bytes:
            weight.cache()
            kept, kept_bytes = kept + 1, kept_bytes + weight.dequantized_bytes
    if kept:
        logger.info("dequantised weights: %d of %d kept, %.2f GB (train.dequantized_cache_gb: %s)", kept, len(quantized),
                    kept_bytes / 1e9, budget_gb)  # fmt: skip


def _budget_bytes(budget_gb: Literal["auto"] | float, device: torch.device) -> float:
    if budget_gb != "auto":
        return budget_gb * 1e9
    return SHARE_OF_FREE_MEMORY * available_bytes() if device.type == "cpu" else 0.0
