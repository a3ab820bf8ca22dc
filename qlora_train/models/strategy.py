"""Choose what each process of a run holds: a whole 4-bit base (ddp), or a part of it (fsdp).

Where the base and its training state fit on every device, a copy per process is faster: only the adapter's gradients are
exchanged. FSDP gathers every layer twice per micro-batch, and holds 1/N of the base.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from qlora_train.architectures import text_config
from qlora_train.config import RunConfig
from qlora_train.config.optimizers import OPTIMIZERS
from qlora_train.models.base_source import BaseSource
from qlora_train.models.checkpoint_tensors import StoredTensor, list_tensors
from qlora_train.parallel import context
from qlora_train.utils.host_memory import available_bytes

logger = logging.getLogger(__name__)

Strategy = Literal["none", "ddp", "fsdp"]

ACTIVATIONS_SHARE = 0.3
"""Share of a device that is left to activations, logits and CUDA itself."""
RESERVED_SHARE = 0.1
"""Share of a device that is left to CUDA and short rows where nothing is trained."""
BITS = {True: 4.127, False: 4.5}
"""Per 4-bit weight with absmax, by double quantization."""
COMPUTE_BYTES = 2
MIN_TORCH = (2, 12)
"""Older releases cannot shard a uint8 parameter."""


@dataclass(frozen=True)
class DeviceNeeds:
    """What a whole base takes of a device.

    Attributes:
        base_bytes: 4-bit weights with absmax, embeddings and head.
        state_bytes: adapter, gradients and optimizer state.
        device_bytes: of the smallest device.
    """

    base_bytes: float
    state_bytes: float
    device_bytes: float

    @property
    def fits(self) -> bool:
        """Whether base and state leave enough to activations."""
        return self.base_bytes + self.state_bytes <= (1 - ACTIVATIONS_SHARE) * self.device_bytes

    @property
    def base_fits(self) -> bool:
        """Whether the base fits at all, to use it without training."""
        return self.base_bytes <= (1 - RESERVED_SHARE) * self.device_bytes

    def __str__(self) -> str:
        parts = [f"{count / 1e9:.1f} GB" for count in (self.base_bytes, self.state_bytes, self.device_bytes)]
        return f"base {parts[0]} and training state {parts[1]} on devices of {parts[2]}"


def choose_strategy(
    setting: Literal["auto", "none", "ddp", "fsdp"], num_processes: int, needs: DeviceNeeds, *, can_shard: bool = True
) -> Strategy:
    """Return what a setting means for a number of processes; `can_shard`: fsdp supports the run."""
    if num_processes == 1 or setting == "none":
        return "none"
    if setting != "auto":
        return setting
    return "ddp" if needs.fits or (needs.base_fits and not can_shard) else "fsdp"


def strategy_of_run(config: RunConfig, source: BaseSource, device: torch.device) -> Strategy:
    """Return the strategy of this run, the same on all ranks, and log it; a collective."""
    setting, num_processes = config.parallel.strategy, context().world_size
    needs = device_needs(config, source, min(context().gather(device_bytes(device))))
    unsupported = unsupported_by_fsdp(config, source)
    strategy = choose_strategy(setting, num_processes, needs, can_shard=not unsupported)
    if num_processes > 1:
        reason = f"{needs}" if setting == "auto" else "parallel.strategy"
        if setting == "auto" and strategy == "ddp" and not needs.fits:
            reason += f"; not fsdp, for {unsupported}"
        logger.info("parallel: %s over %d processes (%s)", strategy, num_processes, reason)
    elif setting in ("ddp", "fsdp"):
        logger.warning("parallel.strategy: %s has no effect (one process, which holds the whole base)", setting)
    return strategy


def unsupported_by_fsdp(config: RunConfig, source: BaseSource) -> str:
    """Return what of a run fsdp refuses before the model loads, or an empty string."""
    stored = source.config.get("quantization_config") or {}
    reasons = {
        "quantization.load_in_4bit: false": not config.quantization.load_in_4bit,
        "a base that is stored in 4 bits": bool(stored.get("load_in_4bit")),
        "lora.use_dora: true": config.lora.use_dora,
        f"torch {torch.__version__}": not shards_bytes(torch.__version__),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def shards_bytes(version: str) -> bool:
    """Return whether a release of torch can shard uint8 parameters."""
    return tuple(int(part) for part in version.split(".")[:2]) >= MIN_TORCH


def device_needs(config: RunConfig, source: BaseSource, device_bytes: float) -> DeviceNeeds:
    """Return what a run's base would take of a device, from the headers of its files.

    Raises:
        ModelError: the files cannot be read.
    """
    tensors = list_tensors(source.folder, f"model.model_name_or_path: {source.name}").values()
    vocab_size = text_config(source.config).get("vocab_size")
    matrices = [tensor for tensor in tensors if len(tensor.shape) >= 2 and tensor.shape[0] != vocab_size]
    others = sum(math.prod(tensor.shape) for tensor in tensors) - sum(math.prod(tensor.shape) for tensor in matrices)
    quantization = config.quantization
    bits = BITS[quantization.bnb_4bit_use_double_quant] if quantization.load_in_4bit else 8 * COMPUTE_BYTES
    trained = _num_trained(matrices, config.lora.r)
    optimizer = OPTIMIZERS["adamw_torch" if config.train.optim == "auto" else config.train.optim]
    per_weight = 4 + 4 + optimizer.num_moments * optimizer.state_bits / 8  # weight, gradient, state
    return DeviceNeeds(_num_weights(matrices) * bits / 8 + others * COMPUTE_BYTES, trained * per_weight, device_bytes)


def _num_weights(matrices: Iterable[StoredTensor]) -> int:
    packed = {"U8": 2}
    return sum(packed.get(matrix.dtype, 1) * math.prod(matrix.shape) for matrix in matrices)


def _num_trained(matrices: Iterable[StoredTensor], rank: int) -> int:
    """Return the weights of LoRA on every matrix, (..., out, in)."""
    return sum(math.prod(matrix.shape[:-2]) * rank * sum(matrix.shape[-2:]) for matrix in matrices)


def device_bytes(device: torch.device) -> float:
    """Return the memory of a GPU, or this process's share of the free host memory."""
    if device.type == "cpu":
        return available_bytes() / context().local_world_size
    return float(torch.cuda.get_device_properties(device).total_memory)
