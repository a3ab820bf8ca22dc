"""What a run holds in memory all the time: base, adapter, optimizer, cache and runtime; and the settings that determine it.

`memory` adds the tensors of each moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_train.config.optimizers import CODE_TABLE_BYTES as OPTIMIZER_TABLE_BYTES
from qlora_train.config.optimizers import MIN_QUANTIZED_NUMEL, OPTIMIZERS, TrainedTensor, optimizer_state_bytes
from qlora_train.kernels.block_sizes import BLOCK_SIZE
from qlora_train.kernels.checkpointing_levels import CheckpointingLevel
from qlora_train.planning.activations import FLOAT32_BYTES, Computation, MicroBatch
from qlora_train.planning.compiled_kernels import expert_kernels_bytes
from qlora_train.planning.model_shape import ModelShape, packed_bytes, quantization_constants_bytes

PARITY_ROWS, PADDING_FREE_ROWS, PARITY_TOKENS = 4, 8, 128
"""Largest batches of the two parity checks."""
CUDA_CONTEXT_BYTES = 500_000_000
"""Of a process on a GPU: 0.3 to 0.6 GB, by GPU and driver."""
CPU_RUNTIME_BYTES = 110_000_000
"""Of a process on a CPU: libraries imported by the load, and oneDNN's cache of compiled kernels (measured)."""

Levels = tuple[CheckpointingLevel, ...]


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What of a run determines its memory, besides the model.

    Attributes:
        optimizer: a name of `OPTIMIZERS`.
        levels: activation checkpointing, per decoder layer.
        eval_batch: rows of an evaluation batch; None: no evaluation.
        accumulates: gradients of earlier micro-batches exist during the step.
        num_ranks: that share the base (FSDP); 1: each has all of it.
        trains_from_adapter: the reference model is an adapter, of which a copy is kept.
        other_trained_numel: trained weights beside LoRA.
        offloads: saved tensors are in host memory.
        cache_bytes: limit of the dequantized weight cache.
        rows: of the largest micro-batch, for the parity checks.
        varies: micro-batches have different lengths.
    """

    batch: MicroBatch
    how: Computation
    optimizer: str
    levels: Levels
    on_gpu: bool
    double_quant: bool = True
    eval_batch: MicroBatch | None = None
    accumulates: bool = False
    num_ranks: int = 1
    trains_from_adapter: bool = False
    other_trained_numel: int = 0
    offloads: bool = False
    cache_bytes: float = 0.0
    rows: int = 1
    varies: bool = False


def base_parts(model: ModelShape, settings: MemorySettings) -> dict[str, int]:
    """Return the bytes of the frozen base on this rank.

    Under FSDP a rank holds its share of packed weights, absmax, embedding and head; the rest is replicated.
    """
    c, ranks = settings.how.compute_bytes, settings.num_ranks
    unquantized = model.unquantized_numel * c
    if not settings.how.is_quantized:
        return {"16-bit weights": model.quantized_numel * c + unquantized}
    packed = packed_bytes(model)
    constants = quantization_constants_bytes(model, settings.double_quant)
    absmax = model.quantized_numel // BLOCK_SIZE * (1 if settings.double_quant else FLOAT32_BYTES)
    root = (model.embedding_numel + model.head_numel) * c
    return {
        "4-bit weights": packed // ranks,
        "quantization constants": constants - absmax + absmax // ranks,
        "16-bit weights": unquantized - root + root // ranks,
    }


def trained_tensors(model: ModelShape, settings: MemorySettings) -> list[TrainedTensor]:
    """Return what is trained."""
    lora = [TrainedTensor(shape) for shape in model.adapter_shapes(settings.how.r)]
    return [*lora, TrainedTensor((settings.other_trained_numel,))] if settings.other_trained_numel else lora


def adapter_numel(model: ModelShape, settings: MemorySettings) -> int:
    """Return the number of trained weights."""
    return sum(tensor.numel for tensor in trained_tensors(model, settings))


def optimizer_bytes(name: str, tensors: Sequence[TrainedTensor]) -> int:
    """Return the bytes of the optimizer's state in memory; paged state counts as resident."""
    total = sum(optimizer_state_bytes(name, tensor) for tensor in tensors)
    if OPTIMIZERS[name].state_bits == 32:
        return total
    # in memory all tensors share the code tables, which a checkpoint stores for each
    num_quantized = sum(tensor.numel >= MIN_QUANTIZED_NUMEL and not tensor.is_embedding for tensor in tensors)
    return total - OPTIMIZERS[name].num_moments * OPTIMIZER_TABLE_BYTES * max(0, num_quantized - 1)


def cached_weights_bytes(model: ModelShape, settings: MemorySettings) -> int:
    """Return the bytes of the dequantized weight cache: adapted linear layers in order, as long as they fit."""
    if not settings.how.fused_kernels or settings.num_ranks > 1 or not settings.how.is_quantized:
        return 0
    cached = 0
    for linear in model.linears():
        size = linear.numel * settings.how.compute_bytes
        if linear.is_adapted and cached + size <= settings.cache_bytes:
            cached += size
    return cached


def held_bytes(model: ModelShape, settings: MemorySettings, *, steps: bool) -> dict[str, int]:
    """Return what is held; `steps`: during training steps, with optimizer state and cache."""
    numel = adapter_numel(model, settings)
    copies = 2 if settings.trains_from_adapter and steps else 1
    held = {
        **base_parts(model, settings),
        "adapter": FLOAT32_BYTES * numel * copies,
        "runtime": CUDA_CONTEXT_BYTES if settings.on_gpu else CPU_RUNTIME_BYTES,
    }
    if steps:
        held["optimizer"] = optimizer_bytes(settings.optimizer, trained_tensors(model, settings))
        held["dequantized cache"] = cached_weights_bytes(model, settings)
        if not settings.on_gpu and settings.how.compute_bytes < FLOAT32_BYTES:
            held["compiled kernels"] = expert_kernels_bytes(model, (settings.batch.num_tokens, parity_tokens(settings)))
    return held


def parity_tokens(settings: MemorySettings) -> int:
    """Return the tokens of the largest batch of the first parity check."""
    return min(PARITY_ROWS, settings.rows) * min(PARITY_TOKENS, settings.batch.longest_row)
