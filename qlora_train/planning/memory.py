"""The memory of a run on one device, computed from shapes and settings.

A run passes through moments: loading, the parity checks, forward and backward passes, evaluation. Each needs what is held
all the time and its own tensors (`activations`); the peak is the largest. What memory cannot shrink (the training step)
decides whether a run fits; parity checks and evaluation try smaller batches when memory runs out.

Not counted: fragmentation on a GPU, and attention of architectures that neither `AttentionShape` nor a table row describes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qlora_train.config.optimizers import TrainedTensor, automatic_optimizer
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
from qlora_train.planning.held_memory import (
    PADDING_FREE_ROWS,
    PARITY_TOKENS,
    Levels,
    MemorySettings,
    adapter_numel,
    held_bytes,
    parity_tokens,
)
from qlora_train.planning.model_shape import LayerShape, ModelShape
from qlora_train.planning.shard_bytes import frozen_bytes

MAX_EVAL_LOGITS = 1 << 28
MAX_HEAP_BLOCK_BYTES = 32 << 20
"""glibc maps larger blocks one by one, and returns them to the system when they are freed (mallopt(3))."""
FRAGMENTATION, VARIED_FRAGMENTATION = 0.42, 0.75
"""Unused memory between the tensors of a step on a CPU, relative to them: of equal lengths, and of different ones."""


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


# --- moments ----------------------------------------------------------------------------------------------------------


def _loading(model: ModelShape, settings: MemorySettings) -> Moment:
    """The base is loaded a tensor at a time: the largest one in 4 bits is whole while its matrices are quantized."""
    stacks = [experts.count * experts.matrix_numel for experts in model.experts()]
    matrices = [*(linear.numel for linear in model.linears()), *(experts.matrix_numel for experts in model.experts())]
    largest = settings.how.compute_bytes * max([*matrices, *stacks], default=0)
    if not settings.on_gpu:  # bitsandbytes quantizes in float32 there
        largest += FLOAT32_BYTES * max(matrices, default=0)
    return Moment("loading", {**held_bytes(model, settings, steps=False), "largest tensor": largest})


def _parity_checks(model: ModelShape, settings: MemorySettings) -> list[Moment]:
    """Return the parity checks: of fused kernels against the reference, and of padding-free rows."""
    if not settings.how.fused_kernels:
        return []
    length, rows = min(PARITY_TOKENS, settings.batch.longest_row), parity_tokens(settings)
    reference = replace(settings.how, fused_kernels=False, chunk_tokens=None, caches_weights=False, has_dropout=False)
    moments = [_parity_check(model, settings, MicroBatch(rows, length, rows), reference)]
    if settings.batch.num_tokens > length:
        tokens = PADDING_FREE_ROWS * length
        fused = replace(reference, fused_kernels=True)
        moments.append(_parity_check(model, settings, MicroBatch(tokens, length, tokens // 2), fused))
    return moments


def _parity_check(model: ModelShape, settings: MemorySettings, batch: MicroBatch, how: Computation) -> Moment:
    checked = replace(
        settings, batch=batch, how=how, levels=fully_checkpointed(model), accumulates=False, offloads=False
    )
    held = held_bytes(model, settings, steps=False)
    if not settings.on_gpu:  # both sides' gradients are compared on the host
        held["gradients to compare"] = 2 * FLOAT32_BYTES * adapter_numel(model, settings)
    step = max(step_parts(model, checked), key=lambda parts: sum(parts.values()))
    return Moment("parity check", {**held, **step}, shrinks=True)


def _steps(model: ModelShape, settings: MemorySettings) -> list[Moment]:
    held = held_bytes(model, settings, steps=True)
    return [
        Moment("training step", {**held, **parts, **_fragmentation(model, settings, parts)})
        for parts in step_parts(model, settings)
    ]


def _fragmentation(model: ModelShape, settings: MemorySettings, parts: Mapping[str, int]) -> dict[str, int]:
    """Return what the heap of a CPU keeps between the tensors of a step: its share was measured."""
    hidden_state = settings.batch.num_tokens * settings.how.compute_bytes * model.hidden_size
    if settings.on_gpu or hidden_state >= MAX_HEAP_BLOCK_BYTES:
        return {}
    share = VARIED_FRAGMENTATION if settings.varies else FRAGMENTATION
    return {"heap fragmentation": round(share * sum(parts.values()))}


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
    held = held_bytes(model, settings, steps=True)
    if not settings.on_gpu:  # the heap keeps a part of what the layers freed
        largest = {"logits": logits, "workspace": layer}
    return Moment("evaluation", {**held, **largest, "adapter in the compute dtype": rounded}, shrinks=True)
