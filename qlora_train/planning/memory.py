"""The memory of a run on one device, computed from shapes and settings.

A run passes through moments: loading, the parity checks, forward and backward passes, evaluation. Each needs what is held
all the time and its own tensors (`activations`); the peak is the largest. What memory cannot shrink (the training step)
decides whether a run fits; parity checks and evaluation try smaller batches when memory runs out.

Not counted: fragmentation, and attention of architectures that neither `AttentionShape` nor a table row describes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qlora_train.config.optimizers import CODE_TABLE_BYTES as OPTIMIZER_TABLE_BYTES
from qlora_train.config.optimizers import (
    MIN_QUANTIZED_NUMEL,
    OPTIMIZERS,
    TrainedTensor,
    automatic_optimizer,
    optimizer_state_bytes,
)
from qlora_train.kernels.block_sizes import BLOCK_SIZE
from qlora_train.kernels.checkpointing_levels import CheckpointingLevel
from qlora_train.objectives.chunk_sizes import EVAL_LOGITS_BYTES, max_chunk_tokens
from qlora_train.planning.activations import (
    FLOAT32_BYTES,
    Computation,
    MicroBatch,
    backward_workspace_bytes,
    forward_workspace_bytes,
    loss_bytes,
    saved_bytes,
    tiled,
)
from qlora_train.planning.compiled_kernels import expert_kernels_bytes
from qlora_train.planning.model_shape import LayerShape, ModelShape, packed_bytes, quantization_constants_bytes
from qlora_train.planning.shard_bytes import frozen_bytes

PARITY_ROWS, PADDING_FREE_ROWS, PARITY_TOKENS = 4, 8, 128
"""Largest batches of the two parity checks."""
MAX_EVAL_LOGITS = 1 << 28
CUDA_CONTEXT_BYTES = 500_000_000
"""Of a process on a GPU: 0.3 to 0.6 GB, by GPU and driver."""
CPU_RUNTIME_BYTES = 148_000_000
"""Of a process on a CPU: libraries imported by the load, compiled kernels, the allocator's slack (measured)."""

MAX_HEAP_BLOCK_BYTES = 32 << 20
"""glibc maps larger blocks one by one, and returns them to the system when they are freed (mallopt(3))."""

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


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes that exist at one moment, by purpose; `shrinks`: smaller batches are tried if memory runs out."""

    name: str
    parts: Mapping[str, int]
    shrinks: bool = False

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The moments of a run."""

    moments: tuple[Moment, ...]
    optimizer: str
    levels: Levels = field(default=())

    @property
    def peak(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the peak."""
        return self.peak.total_bytes

    @property
    def needed_bytes(self) -> int:
        """Bytes without which the run ends: those of moments that cannot shrink."""
        return max(moment.total_bytes for moment in self.moments if not moment.shrinks)


def plan_memory(model: ModelShape, settings: MemorySettings) -> MemoryPlan:
    """Return the memory of a run on one device."""
    moments = [_loading(model, settings), *_parity_checks(model, settings), *_steps(model, settings)]
    if settings.eval_batch is not None:
        moments.append(_evaluation(model, settings, settings.eval_batch))
    return MemoryPlan(tuple(moments), settings.optimizer, settings.levels)


def fully_checkpointed(model: ModelShape) -> Levels:
    """Return the level `full` for every layer."""
    levels: list[CheckpointingLevel] = ["full" for _ in model.layers]
    return tuple(levels)


def step_settings(
    model: ModelShape,
    *,
    r: int,
    num_tokens: int,
    num_labels: int | None = None,
    gpu_bytes: int = 0,
    fused_kernels: bool = True,
    accumulates: bool = False,
) -> MemorySettings:
    """Return the settings of a step on one row, on a GPU, with full checkpointing and `train.optim: auto`.

    Args:
        num_labels: None: every token.
        gpu_bytes: selects the optimizer; 0: the one with the smaller state.
    """
    batch = MicroBatch(num_tokens, num_tokens, num_tokens if num_labels is None else num_labels)
    how = Computation(r, fused_kernels=fused_kernels, chunk_tokens=max_chunk_tokens("cuda", model.vocab_size))
    tensors = [TrainedTensor(shape) for shape in model.adapter_shapes(r)]
    return MemorySettings(
        batch=batch, how=how, optimizer=automatic_optimizer(tensors, gpu_bytes), levels=fully_checkpointed(model),
        on_gpu=True, accumulates=accumulates,
    )  # fmt: skip


# --- what is held all the time ----------------------------------------------------------------------------------------


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


def _held(model: ModelShape, settings: MemorySettings, *, steps: bool) -> dict[str, int]:
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
            held["compiled kernels"] = expert_kernels_bytes(
                model, (settings.batch.num_tokens, _parity_tokens(settings))
            )
    return held


# --- moments ----------------------------------------------------------------------------------------------------------


def _loading(model: ModelShape, settings: MemorySettings) -> Moment:
    """The base is loaded a tensor at a time: the largest one in 4 bits is whole while its matrices are quantized."""
    stacks = [experts.count * experts.matrix_numel for experts in model.experts()]
    matrices = [*(linear.numel for linear in model.linears()), *(experts.matrix_numel for experts in model.experts())]
    largest = settings.how.compute_bytes * max([*matrices, *stacks], default=0)
    if not settings.on_gpu:  # bitsandbytes quantizes in float32 there
        largest += FLOAT32_BYTES * max(matrices, default=0)
    return Moment("loading", {**_held(model, settings, steps=False), "largest tensor": largest})


def _parity_checks(model: ModelShape, settings: MemorySettings) -> list[Moment]:
    """Return the parity checks: of fused kernels against the reference, and of padding-free rows."""
    if not settings.how.fused_kernels:
        return []
    length, rows = min(PARITY_TOKENS, settings.batch.longest_row), _parity_tokens(settings)
    reference = replace(settings.how, fused_kernels=False, chunk_tokens=None, caches_weights=False, has_dropout=False)
    moments = [_parity_check(model, settings, MicroBatch(rows, length, rows), reference)]
    if settings.batch.num_tokens > length:
        tokens = PADDING_FREE_ROWS * length
        fused = replace(reference, fused_kernels=True)
        moments.append(_parity_check(model, settings, MicroBatch(tokens, length, tokens // 2), fused))
    return moments


def _parity_tokens(settings: MemorySettings) -> int:
    return min(PARITY_ROWS, settings.rows) * min(PARITY_TOKENS, settings.batch.longest_row)


def _parity_check(model: ModelShape, settings: MemorySettings, batch: MicroBatch, how: Computation) -> Moment:
    checked = replace(
        settings, batch=batch, how=how, levels=fully_checkpointed(model), accumulates=False, offloads=False
    )
    held = _held(model, settings, steps=False)
    if not settings.on_gpu:  # both sides' gradients are compared on the host
        held["gradients to compare"] = 2 * FLOAT32_BYTES * adapter_numel(model, settings)
    step = max(step_parts(model, checked), key=lambda parts: sum(parts.values()))
    return Moment("parity check", {**held, **step}, shrinks=True)


def _steps(model: ModelShape, settings: MemorySettings) -> list[Moment]:
    held = _held(model, settings, steps=True)
    return [Moment("training step", {**held, **parts}) for parts in step_parts(model, settings)]


def step_parts(model: ModelShape, settings: MemorySettings) -> list[dict[str, int]]:
    """Return the transient bytes of the loss, the first layer of the backward pass, and its last layer."""
    batch, how = settings.batch, settings.how
    gradients = FLOAT32_BYTES * adapter_numel(model, settings)
    saved = [
        saved_bytes(model, layer, batch, how, level) for layer, level in zip(model.layers, settings.levels, strict=True)
    ]
    rounded = 0 if how.fused_kernels else adapter_numel(model, settings) * how.compute_bytes  # cached by autocast
    kept = sum(saved) + _shared_bytes(model, batch, how)
    if settings.offloads:
        kept = 2 * max(saved)
    gathered = _gathered_bytes(model, settings)
    before = {"gradients": gradients} if settings.accumulates else {}
    loss = {**before, "activations": kept, "logits": loss_bytes(model, batch, how) + rounded, **gathered}
    work = [_layer_workspace_bytes(model, settings, index, level) for index, level in enumerate(settings.levels)]
    # a mixture's gradients are summed over its experts before they are added to those of earlier micro-batches
    summed = [FLOAT32_BYTES * how.r * _adapted_expert_widths(layer) for layer in model.layers]
    backward = {**before, "activations": kept, "workspace": work[-1] + summed[-1], **gathered}
    in_last = max(work) + (summed[0] if settings.accumulates else 0)
    last = {"gradients": gradients, "activations": saved[0], "workspace": in_last, **gathered}
    optimizer = {"gradients": gradients}
    return [loss, backward, last, optimizer]


def _adapted_expert_widths(layer: LayerShape) -> int:
    """Return the inputs and outputs of all adapted expert matrices of a layer: LoRA's weights per rank."""
    return sum(experts.count * experts.width for experts in layer.experts if experts.is_adapted)


def _shared_bytes(model: ModelShape, batch: MicroBatch, how: Computation) -> int:
    """Return what is saved outside of decoder layers: the final norm's input, positions, ids and labels."""
    attention = model.layers[-1].attention
    head_dim = attention.query_width // attention.num_heads if attention is not None else 0
    return batch.num_tokens * (how.compute_bytes * (model.hidden_size + 2 * head_dim) + 4 * 8)


def _layer_workspace_bytes(model: ModelShape, settings: MemorySettings, index: int, level: CheckpointingLevel) -> int:
    """Return the peak of a layer's backward pass beyond what was saved: for checkpointed layers, what is recomputed."""
    layer, batch, how = model.layers[index], settings.batch, settings.how
    if level == "none":
        return backward_workspace_bytes(model, layer, batch, how)
    whole = saved_bytes(model, layer, batch, how, "none")
    if how.fused_kernels and layer.has_gated_mlp:  # the MLP is recomputed in tiles
        tile = tiled(batch)
        mlp = saved_bytes(model, layer, tile, how, "none") - saved_bytes(model, layer, tile, how, "mlp")
        recomputed = mlp if level == "mlp" else mlp + saved_bytes(model, layer, batch, how, "mlp")
        return recomputed + backward_workspace_bytes(model, layer, tile if level == "mlp" else batch, how)
    return whole + backward_workspace_bytes(model, layer, batch, how)


def _gathered_bytes(model: ModelShape, settings: MemorySettings) -> dict[str, int]:
    """Return the units that FSDP gathers: embedding and head, the layer that computes and the one gathered ahead."""
    if settings.num_ranks == 1:
        return {}
    frozen = frozen_bytes(model, compute_bytes=settings.how.compute_bytes)
    return {"gathered weights": frozen.root + 2 * frozen.layer}


def _evaluation(model: ModelShape, settings: MemorySettings, batch: MicroBatch) -> Moment:
    """A batch without gradients: the widest layer with one dequantized weight, or the logits at the labels."""
    how = replace(settings.how, caches_weights=False)
    c = how.compute_bytes
    layer = max(forward_workspace_bytes(model, each, batch, how) for each in model.layers)
    num_logits = min(MAX_EVAL_LOGITS, batch.num_labels * model.vocab_size)
    logits = num_logits * c + 2 * min(EVAL_LOGITS_BYTES, FLOAT32_BYTES * num_logits)
    rounded = c * adapter_numel(model, settings)  # cached by autocast
    largest = {"logits": logits} if logits > layer else {"workspace": layer}
    held = _held(model, settings, steps=True)
    if not settings.on_gpu:  # the heap keeps what a layer freed
        largest = {"logits": logits, "workspace": layer}
        held["memory not returned by the allocator"] = _retained_bytes(model, settings)
    return Moment("evaluation", {**held, **largest, "adapter in the compute dtype": rounded}, shrinks=True)


def _retained_bytes(model: ModelShape, settings: MemorySettings) -> int:
    """Return what the C library keeps of a step's activations: blocks that it did not map one by one."""
    batch, how = settings.batch, settings.how
    if batch.num_tokens * how.compute_bytes * model.hidden_size >= MAX_HEAP_BLOCK_BYTES:
        return 0
    saved = [
        saved_bytes(model, layer, batch, how, level) for layer, level in zip(model.layers, settings.levels, strict=True)
    ]
    return sum(saved)
