"""Choose as a run does what memory decides: optimizer, token budget and activation checkpointing. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qlora_train.config import RunConfig
from qlora_train.config.objectives import uses_reference
from qlora_train.config.optimizers import TrainedTensor, automatic_optimizer
from qlora_train.kernels.checkpointing_levels import LEVELS, CheckpointingLevel, plan_levels
from qlora_train.objectives.chunk_sizes import max_chunk_tokens
from qlora_train.planning.activations import Computation, MicroBatch, mlp_linears, saved_bytes
from qlora_train.planning.held_memory import MemorySettings, cached_weights_bytes, trained_tensors
from qlora_train.planning.memory import MemoryPlan, plan_memory
from qlora_train.planning.model_shape import LayerShape, ModelShape
from qlora_train.planning.plan_device import PlanDevice
from qlora_train.planning.workload import Workload
from qlora_train.utils.constants import CACHE_SHARE

COMPUTE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class FittedMemory:
    """The memory of a run with the settings that it would choose.

    Attributes:
        batch: the largest micro-batch.
        has_raised_budget: it has more tokens than that of the settings.
        fits: the device has what the run cannot do without.
        tensors: that are trained.
        least_bytes: what the run cannot do without: spare memory goes to less recomputation or larger micro-batches.
    """

    plan: MemoryPlan
    batch: MicroBatch
    has_raised_budget: bool
    fits: bool
    tensors: list[TrainedTensor]
    least_bytes: int


def fit_memory(
    config: RunConfig, model: ModelShape, work: Workload, device: PlanDevice, *, num_ranks_of_base: int = 1
) -> FittedMemory:
    """Return the memory of a run on a device.

    Args:
        num_ranks_of_base: that share the base (FSDP).
    """
    settings = memory_settings(config, model, work, device, num_ranks_of_base)
    fitted = _fit(config, model, settings, device)
    if work.raised_batch is None:
        return fitted
    raised = _fit(config, model, replace(settings, batch=work.raised_batch), device)
    # less recomputation comes before larger micro-batches
    if raised.fits and (set(raised.plan.levels) <= {"none"} or not _relaxes(config, settings)):
        return replace(raised, has_raised_budget=True, least_bytes=fitted.least_bytes)
    return fitted


def _fit(config: RunConfig, model: ModelShape, settings: MemorySettings, device: PlanDevice) -> FittedMemory:
    plan = plan_memory(model, settings)
    least_bytes, tensors = plan.needed_bytes, trained_tensors(model, settings)
    fits = least_bytes <= device.usable_bytes
    if fits and _relaxes(config, settings):
        spare = device.usable_bytes - least_bytes
        levels = tuple(plan_levels(_saved_by_level(model, settings), _recompute_cost(model), spare))
        relaxed = plan_memory(model, replace(settings, levels=levels))
        plan = relaxed if relaxed.needed_bytes <= device.usable_bytes else plan
    return FittedMemory(plan, settings.batch, False, fits, tensors, least_bytes)


def memory_settings(
    config: RunConfig, model: ModelShape, work: Workload, device: PlanDevice, num_ranks_of_base: int
) -> MemorySettings:
    """Return the settings of a run before memory decides any: full checkpointing where it is automatic on a GPU."""
    train, quantization = config.train, config.quantization
    dtype = quantization.bnb_4bit_compute_dtype
    fused = train.fused_kernels and not config.lora.use_dora
    level: CheckpointingLevel = "full" if device.on_gpu else "none"
    if train.gradient_checkpointing != "auto":
        level = train.gradient_checkpointing
    how = Computation(
        r=config.lora.r,
        compute_bytes=COMPUTE_BYTES.get(dtype, device.compute_bytes),
        fused_kernels=fused,
        has_dropout=config.lora.lora_dropout > 0,
        is_quantized=quantization.load_in_4bit,
        chunk_tokens=max_chunk_tokens(device.kind, model.vocab_size),
    )
    settings = MemorySettings(
        batch=work.batch,
        how=how,
        optimizer="",
        levels=(level,) * len(model.layers),
        on_gpu=device.on_gpu,
        double_quant=quantization.bnb_4bit_use_double_quant,
        eval_batch=work.eval_batch,
        accumulates=work.num_micro_batches > 1,
        num_ranks=num_ranks_of_base,
        trains_from_adapter=config.lora.adapter_path is not None and uses_reference(train.objective),
        other_trained_numel=_other_trained_numel(config, model),
        offloads=train.activation_offloading and device.on_gpu,
        cache_bytes=_cache_bytes(config, device),
        rows=work.num_rows,
        varies=work.varies,
    )
    settings = replace(settings, optimizer=optimizer_of(config, trained_tensors(model, settings), device))
    has_cache = cached_weights_bytes(model, settings) >= sum(
        linear.numel * how.compute_bytes for linear in model.linears()
    )
    return replace(settings, how=replace(how, caches_weights=has_cache))


def optimizer_of(config: RunConfig, tensors: list[TrainedTensor], device: PlanDevice) -> str:
    """Return what `train.optim` means on a device."""
    if config.train.optim != "auto":
        return config.train.optim
    return automatic_optimizer(tensors, device.memory_bytes if device.on_gpu else None)


def _relaxes(config: RunConfig, settings: MemorySettings) -> bool:
    """Return whether a run gives spare memory to less recomputation."""
    automatic = config.train.gradient_checkpointing == "auto" and settings.on_gpu
    return automatic and not settings.offloads and settings.num_ranks == 1


def _other_trained_numel(config: RunConfig, model: ModelShape) -> int:
    """Return the trained weights beside LoRA: modules in full, rows of new tokens, magnitudes of DoRA."""
    sizes = {"embed_tokens": model.embedding_numel, "lm_head": model.vocab_size * model.hidden_size}
    whole = sum(sizes.get(name.rpartition(".")[2], 0) for name in config.lora.modules_to_save)
    matrices = 2 if model.head_numel else 1
    rows = len(config.model.new_tokens) * model.hidden_size * matrices
    magnitudes = sum(linear.out_features for linear in model.linears() if linear.is_adapted)
    return whole + rows + (magnitudes if config.lora.use_dora else 0)


def _cache_bytes(config: RunConfig, device: PlanDevice) -> float:
    limit = config.train.dequantized_cache_gb
    if limit != "auto":
        return limit * 1e9
    return 0.0 if device.on_gpu else CACHE_SHARE * device.memory_bytes


def _saved_by_level(model: ModelShape, settings: MemorySettings) -> Mapping[CheckpointingLevel, list[int]]:
    has_mlps = settings.how.fused_kernels and any(layer.has_gated_mlp for layer in model.layers)
    levels = LEVELS if has_mlps else tuple(level for level in LEVELS if level != "mlp")
    return {
        level: [saved_bytes(model, layer, settings.batch, settings.how, level) for layer in model.layers]
        for level in levels
    }


def _recompute_cost(model: ModelShape) -> Callable[[int, CheckpointingLevel], float]:
    def cost(index: int, level: CheckpointingLevel) -> float:
        return {"none": 0.0, "mlp": _mlp_share(model.layers[index]), "full": 1.0}[level]

    return cost


def _mlp_share(layer: LayerShape) -> float:
    """Return the work of gate and up relative to that of a whole layer, whose last product is not recomputed."""
    mlp = mlp_linears(layer)
    total = sum(linear.numel for linear in layer.linears)
    last = mlp[-1].numel if mlp else 0
    return sum(linear.numel for linear in mlp[:-1]) / max(1, total - last)
