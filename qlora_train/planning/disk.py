"""The disk space that a run still needs, checked before its first step."""

import math
from pathlib import Path

from peft.tuners.lora import LoraLayer

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.planning.disk_plan import DiskPlan, RunSize, estimate_disk
from qlora_train.runs import RunFolder
from qlora_train.training.optimizer import trained_tensors
from qlora_train.utils.errors import TrainingError


def check_disk_space(run: RunFolder, plan: DiskPlan, free_bytes: int) -> None:
    """Raise a TrainingError if the plan exceeds the free bytes."""
    if plan.total_bytes <= free_bytes:
        return
    unit, unit_bytes = ("GB", 10**9) if plan.total_bytes >= 10**9 else ("MB", 10**6)

    def rounded_up(size_bytes: int) -> str:
        return f"{math.ceil(10 * size_bytes / unit_bytes) / 10:.1f} {unit}"

    parts = ", ".join(f"{name} {rounded_up(size_bytes)}" for name, size_bytes in plan.parts())
    raise TrainingError(
        f"run.output_dir: needs {rounded_up(plan.total_bytes)} on the disk of {run.path} ({parts}) and "
        f"{math.floor(10 * free_bytes / unit_bytes) / 10:.1f} {unit} are free; make room, lower train.save_total_limit, or "
        "choose another run.output_dir"
    )


def plan_disk(
    run: RunFolder, adapted: AdaptedModel, config: RunConfig, data: PreparedData, checkpoint: Path | None
) -> DiskPlan:
    """Estimate what a run still writes; `config` has the resolved optimizer."""
    size = RunSize(
        tensors=trained_tensors(adapted),
        num_tokens=len(adapted.loaded.tokenizer),
        merged_numel=_merged_numel(adapted),
        num_rows=data.num_train_rows,
        has_eval=bool(data.eval),
        stored_in_4bit=config.export.merge and _is_stored_in_4bit(adapted),
    )
    num_existing = sum(run.checkpoint_problem(step) is None for step in run.checkpoint_steps())
    done = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    return estimate_disk(config, size, num_existing=num_existing, done=done)


def _is_stored_in_4bit(adapted: AdaptedModel) -> bool:
    from qlora_train.export.merging.merge_files import is_stored_in_4bit

    return is_stored_in_4bit(adapted.loaded.source.folder)


def _merged_numel(adapted: AdaptedModel) -> int:
    """Return the maximum number of weights of a merged model.

    A fully trained module counts beside the original, from which it may be untied; so does a head with its own adapter.
    """
    low_rank = sum(parameter.numel() for name, parameter in trainable_state(adapted.model).items() if "lora_" in name)
    head = adapted.model.get_output_embeddings()
    untied = head.weight.numel() if isinstance(head, LoraLayer) else 0
    return adapted.num_total - low_rank + untied
