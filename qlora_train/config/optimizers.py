"""The table of optimizers, which the schema, the planner and the trainer read, and the size of their state."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

BLOCK_SIZE = 256
"""Elements per scale in bitsandbytes' 8-bit state."""
MIN_QUANTIZED_NUMEL = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
CODE_TABLE_BYTES = 256 * 4
"""The 256 values of the 8-bit code, stored with each tensor's state."""
SMALL_STATE_SHARE = 0.02
"""Share of a GPU's memory up to which AdamW's float32 state stays on the GPU."""


@dataclass(frozen=True)
class Optimizer:
    """One row: a name of Transformers' `OptimizerNames` and the state that it keeps per parameter."""

    name: str
    num_moments: int
    state_bits: int = 32
    paged: bool = False
    factored: bool = False
    """Keeps sums of rows and columns in place of a second moment."""


OPTIMIZERS = {
    row.name: row
    for row in (
        Optimizer("paged_adamw_8bit", 2, state_bits=8, paged=True),
        Optimizer("paged_adamw_32bit", 2, paged=True),
        Optimizer("adamw_8bit", 2, state_bits=8),
        Optimizer("adamw_torch", 2),
        Optimizer("adamw_torch_fused", 2),
        Optimizer("paged_lion_8bit", 1, state_bits=8, paged=True),
        Optimizer("lion_8bit", 1, state_bits=8),
        Optimizer("adafactor", 0, factored=True),
        Optimizer("sgd", 0),
    )
}


@dataclass(frozen=True)
class TrainedTensor:
    """A trainable float32 tensor; bitsandbytes keeps the state of embeddings in 32 bits."""

    shape: tuple[int, ...]
    is_embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def automatic_optimizer(tensors: Iterable[TrainedTensor], gpu_bytes: int | None) -> str:
    """Return the optimizer for `train.optim: auto` on a GPU with `gpu_bytes` of memory, or on a CPU (None)."""
    state_bytes = sum(optimizer_state_bytes("adamw_torch_fused", tensor) for tensor in tensors)
    small = gpu_bytes is None or state_bytes <= SMALL_STATE_SHARE * gpu_bytes
    return "adamw_torch_fused" if small else "paged_adamw_8bit"


def optimizer_state_bytes(name: str, tensor: TrainedTensor) -> int:
    """Return the bytes of the state of one tensor, in memory and in a checkpoint."""
    optimizer, numel, shape = OPTIMIZERS[name], tensor.numel, tensor.shape
    if optimizer.factored:
        return 4 * (numel if len(shape) < 2 else numel // shape[-1] + numel // shape[-2])
    if optimizer.state_bits == 32 or numel < MIN_QUANTIZED_NUMEL or tensor.is_embedding:
        return optimizer.num_moments * 4 * numel
    return optimizer.num_moments * (numel + 4 * math.ceil(numel / BLOCK_SIZE) + CODE_TABLE_BYTES)
