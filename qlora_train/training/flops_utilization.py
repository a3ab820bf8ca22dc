"""Model FLOPs utilization (MFU): what the steps must compute, as a share of what the device could (arXiv 2204.02311, B).

Counted per token: 4 operations per weight of the linear layers that it passes (2 forward, 2 for the gradient of the input:
frozen weights have none of their own) and 6 per LoRA weight; per label, 4 per weight of the output head. Not counted:
attention between tokens, dequantization, what checkpointing recomputes, forward passes of a reference model and for KTO's
KL estimate. Shared prefixes count in every row. So the value is too low for long rows, and
too high where rows share prefixes.
"""

import logging
from dataclasses import dataclass

import torch

from qlora_train.parallel import context
from qlora_train.training.peak_flops import peak_flops

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Floating-point operations of a forward and backward pass."""

    per_token: float
    per_label: float

    @classmethod
    def of(cls, *, base_numel: int, adapter_numel: int, head_numel: int) -> "ModelFlops":
        """Count them from numbers of weights.

        Args:
            base_numel: weights of the linear layers that a token passes; of a mixture, those of its experts.
            adapter_numel: LoRA weights that a token passes.
            head_numel: weights of the output head.
        """
        return cls(4.0 * base_numel + 6.0 * adapter_numel, 4.0 * head_numel)


@dataclass(frozen=True, slots=True)
class Utilization:
    """`peak`: operations per second that all processes could compute together."""

    flops: ModelFlops
    peak: float

    def mfu(self, num_tokens: int, num_labels: int, seconds: float) -> float:
        """Return the utilization of steps that took `seconds`, 0 to 1."""
        return (self.flops.per_token * num_tokens + self.flops.per_label * num_labels) / (self.peak * seconds)


def utilization(flops: ModelFlops | None, device: torch.device, dtype: torch.dtype) -> Utilization | None:
    """Return what computes a run's MFU; None where operations or peak are unknown."""
    if flops is None or (peak := peak_flops(device, dtype)) is None:
        return None
    logger.debug("mfu: of %.4g TFLOP/s per process (%s)", peak.per_second / 1e12, peak.source)
    return Utilization(flops, peak.per_second * context().world_size)
