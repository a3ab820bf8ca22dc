"""How large the state of an optimizer is, counted from what trains: in memory, and in the file of a checkpoint."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

NUM_MOMENTS = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "paged_adamw_32bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2,
    "lion_8bit": 1, "paged_lion_8bit": 1, "sgd": 0, "adafactor": 0,
}  # fmt: skip
"""Numbers that an optimizer keeps for each trained one; Adafactor keeps sums of rows and columns instead."""
BLOCK_SIZE = 256
"""Numbers that share a scale in bitsandbytes' 8-bit state."""
MIN_QUANTIZED_NUMEL = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
CODE_TABLE_BYTES = 256 * 4
"""The 256 values of 8-bit numbers, which the state of every tensor names."""


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor that trains, in float32; optimizers keep the state of a whole embedding in 32 bits."""

    shape: tuple[int, ...]
    is_embedding: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


SMALL_STATE_SHARE = 0.02
"""Of a GPU's memory: up to here AdamW's float32 state stays there."""


def automatic_optimizer(tensors: Iterable[TrainedTensor], gpu_bytes: int | None) -> str:
    """Return what `train.optim: auto` is for these tensors on a GPU of so much memory; None is a CPU."""
    state_bytes = sum(optimizer_state_bytes("adamw_torch_fused", tensor) for tensor in tensors)
    small = gpu_bytes is None or state_bytes <= SMALL_STATE_SHARE * gpu_bytes
    return "adamw_torch_fused" if small else "paged_adamw_8bit"


def optimizer_state_bytes(optimizer: str, tensor: TrainedTensor) -> int:
    """Return the bytes of an optimizer's state of one trained tensor; `optimizer` is its name in `train.optim`."""
    num_moments, numel = NUM_MOMENTS[optimizer], tensor.numel
    if optimizer == "adafactor":
        return 4 * (numel if len(tensor.shape) < 2 else numel // tensor.shape[-1] + numel // tensor.shape[-2])
    if "8bit" not in optimizer or numel < MIN_QUANTIZED_NUMEL or tensor.is_embedding:
        return num_moments * 4 * numel
    return num_moments * (numel + 4 * math.ceil(numel / BLOCK_SIZE) + CODE_TABLE_BYTES)
