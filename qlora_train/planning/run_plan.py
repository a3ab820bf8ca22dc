"""The plan of a run before anything is downloaded: memory, disk, steps, tokens and time. No torch for known families."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.architectures import detect
from qlora_train.config import LoraSection, RunConfig
from qlora_train.planning.disk_plan import DiskPlan, RunSize, estimate_disk
from qlora_train.planning.family_shapes import FAMILIES, family_shapes
from qlora_train.planning.fit_memory import FittedMemory, fit_memory
from qlora_train.planning.model_shape import ModelShape
from qlora_train.planning.plan_device import PlanDevice
from qlora_train.planning.workload import RowSizes, Workload, plan_workload
from qlora_train.utils.visible_gpus import visible_gpus


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run needs.

    Attributes:
        num_ranks: processes.
        is_sharded: they share the base (FSDP).
        disk: None if the number of steps is unknown.
        download_bytes: of a base on the Hub, in 16 bits; 0 for a local one.
        seconds: of training; None if nothing comparable was measured.
        reference_seconds: of the reference model's pass before it; None likewise, or without one.
        caveats: why the memory is known to be loose, one line each.
    """

    model_type: str
    model: ModelShape
    device: PlanDevice
    work: Workload
    fitted: FittedMemory
    num_trained: int
    num_ranks: int
    is_sharded: bool
    disk: DiskPlan | None
    download_bytes: int
    seconds: float | None = None
    reference_seconds: float | None = None
    caveats: tuple[str, ...] = ()

    @property
    def operations(self) -> float | None:
        """Floating-point operations of training that grow with the number of tokens; None if that is unknown.

        4 per linear weight and token and 4 per weight of the head, as frozen weights have no gradient, and 2 for a
        reference pass in the step. Attention and LoRA are left out: the number compares runs.
        """
        if self.work.num_tokens is None or self.work.step_reference_tokens is None:
            return None
        return self._num_passed * (4.0 * self.work.num_tokens + 2.0 * self.work.step_reference_tokens)

    @property
    def reference_operations(self) -> float | None:
        """Floating-point operations of the reference model's pass before step 1; None if unknown."""
        return None if self.work.reference_tokens is None else 2.0 * self._num_passed * self.work.reference_tokens

    @property
    def _num_passed(self) -> int:
        """Weights that each token passes, with those of the head."""
        return self.model.active_numel + self.model.vocab_size * self.model.hidden_size

    @property
    def disk_bytes(self) -> int | None:
        """Bytes that the run writes, without the base; None if the number of steps is unknown."""
        return None if self.disk is None else self.disk.total_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `plan --json` prints it and plan.json stores it."""
        memory = self.fitted.plan
        levels = memory.levels
        return {
            "peak_bytes": memory.peak_bytes,
            "parts": {name: size for name, size in memory.peak.parts.items() if size},
            "num_steps": self.work.num_steps,
            "seconds": self.seconds,
            "reference_seconds": self.reference_seconds,
            "disk_bytes": self.disk_bytes,
            "peak_moment": memory.peak.name,
            "caveats": list(self.caveats),
            "needed_bytes": memory.needed_bytes,
            "fits": self.fitted.fits,
            "device": self.device.name,
            "device_bytes": self.device.memory_bytes,
            "download_bytes": self.download_bytes,
            "num_tokens": self.work.num_tokens,
            "operations": self.operations,
            "num_weights": self.model.numel,
            "num_trained": self.num_trained,
            "num_processes": self.num_ranks,
            "micro_batch_tokens": self.fitted.batch.num_tokens,
            "optimizer": memory.optimizer,
            "gradient_checkpointing": {level: levels.count(level) for level in dict.fromkeys(levels)},
        }


def model_shapes(config_json: Mapping[str, Any], lora: LoraSection) -> ModelShape:
    """Return the shapes of a base: by arithmetic, or of a model on the meta device.

    Raises:
        ModelError: Transformers has no causal language model of this model_type.
    """
    shape = family_shapes(config_json, lora)
    if shape is not None:
        return shape
    from qlora_train.planning.meta_shapes import meta_shapes

    return meta_shapes(config_json, lora)


def plan_run(
    config: RunConfig,
    config_json: Mapping[str, Any],
    device: PlanDevice,
    sizes: RowSizes,
    *,
    is_local: bool = True,
    processes: tuple[int, bool] | None = None,
) -> RunPlan:
    """Plan a run.

    Args:
        config_json: the content of the base's config.json.
        device: of each process.
        sizes: of the data.
        is_local: the base needs no download.
        processes: their number, and whether they share the base; None: as the config says.

    Raises:
        ModelError: no causal language model can be built from config.json.
    """
    model = model_shapes(config_json, config.lora)
    num_ranks = num_processes(config, device) if processes is None else processes[0]
    work = plan_workload(config, sizes, on_gpu=device.on_gpu, num_ranks=num_ranks)
    fitted = fit_memory(config, model, work, device)
    strategy = config.parallel.strategy
    is_sharded = num_ranks > 1 and (strategy == "fsdp" or (strategy == "auto" and not fitted.fits))
    if processes is not None:
        is_sharded = processes[1]
    if is_sharded:
        fitted = fit_memory(config, model, work, device, num_ranks_of_base=num_ranks)
    return RunPlan(
        model_type=detect(config_json).model_type,
        model=model,
        device=device,
        work=work,
        fitted=fitted,
        num_trained=sum(tensor.numel for tensor in fitted.tensors),
        num_ranks=num_ranks,
        is_sharded=is_sharded,
        disk=_disk(config, config_json, model, work, sizes, fitted),
        download_bytes=0 if is_local else 2 * model.numel,
        caveats=tuple(_caveats(config_json)),
    )


def _caveats(config_json: Mapping[str, Any]) -> Iterator[str]:
    family = detect(config_json).model_type
    if FAMILIES.get(family) is None:
        yield f"layers of {family} are not described: tensors may be left out"


def num_processes(config: RunConfig, device: PlanDevice) -> int:
    """Return the number of processes: one per visible GPU, or one where another machine is planned for."""
    processes = config.parallel.processes
    if processes != "auto":
        return processes
    return max(1, len(visible_gpus())) if device.on_gpu and device.is_this_machine else 1


def _disk(
    config: RunConfig,
    config_json: Mapping[str, Any],
    model: ModelShape,
    work: Workload,
    sizes: RowSizes,
    fitted: FittedMemory,
) -> DiskPlan | None:
    if work.num_steps is None and config.train.minutes is None:
        return None
    train = config.train.model_copy(update={"optim": fitted.plan.optimizer})
    stored = config_json.get("quantization_config") or {}
    size = RunSize(
        tensors=fitted.tensors,
        num_tokens=model.vocab_size,
        merged_numel=model.numel,
        num_rows=sizes.num_rows,
        has_eval=config.data.eval is not None,
        stored_in_4bit=bool(stored.get("load_in_4bit")),
    )
    return estimate_disk(config.model_copy(update={"train": train}), size)
