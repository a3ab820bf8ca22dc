"""Estimate the disk space of a run before its first step.

Counted are the checkpoints that exist at the same time, the adapter, and the merge with all its candidates. Every number is
a close upper bound: tensors are exact, names and small files are rounded up. Not counted are the cache of tokenised data
(written before), trackers, later evaluations, quotas and other processes; a disk that fills up costs no checkpoint.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from peft.tuners.lora import LoraLayer

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.config import RunConfig
from qlora_train.config.optimizers import TrainedTensor, optimizer_state_bytes
from qlora_train.config.schema import TrainSection
from qlora_train.data import PreparedData
from qlora_train.export.adapter_check import MAX_REFERENCE_BYTES
from qlora_train.runs import RunFolder
from qlora_train.training.optimizer import trained_tensors
from qlora_train.utils.errors import TrainingError

ADAPTER_DTYPE_BYTES, MERGED_DTYPE_BYTES = 4, 2
TENSOR_NAMES_BYTES = 1024
"""Per trained tensor and its optimizer state: names, shapes and offsets in JSON and in safetensors headers."""
LOG_ENTRY_BYTES = 320
"""Per entry of the log history in a checkpoint; most have 200 to 250."""
SMALL_FILES_BYTES = 64 * 1024
"""RNG state, counters, manifest, and the unused part of each file's last block."""
MAX_STEPS_PER_SECOND = 10
"""Assumed with `train.minutes`: the trial that sets the number of steps comes later."""
TOKEN_BYTES = 160
"""Per token in the tokenizer files, merges included; large vocabularies have 75 to 135."""


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Maximum bytes that a run adds to its disk.

    Attributes:
        num_checkpoints: maximum number at the same time, beyond those that exist now.
        num_merges: merged models at the same time.
        reference_bytes: temporary predictions of the trained model, for the adapter check.
    """

    num_checkpoints: int
    checkpoint_bytes: int
    adapter_bytes: int
    num_merges: int = 0
    merged_bytes: int = 0
    reference_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(size_bytes for _, size_bytes in self.parts())

    def parts(self) -> list[tuple[str, int]]:
        """Return name and bytes of each part."""
        parts = [
            (_plural(self.num_checkpoints, "checkpoint"), self.num_checkpoints * self.checkpoint_bytes),
            ("adapter", self.adapter_bytes),
            ("adapter check", self.reference_bytes),
            ("merged model" if self.num_merges == 1 else _plural(self.num_merges, "merged model"),
             self.num_merges * self.merged_bytes),
        ]  # fmt: skip
        return [(name, size_bytes) for name, size_bytes in parts if size_bytes]


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
    train, num_rows = config.train, data.num_train_rows
    tensors = trained_tensors(adapted)
    num_existing = sum(run.checkpoint_problem(step) is None for step in run.checkpoint_steps())
    done = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    steps = num_steps(train, num_rows)
    tokenizer_bytes = TOKEN_BYTES * len(adapted.loaded.tokenizer) + SMALL_FILES_BYTES
    num_kept = train.save_total_limit + train.load_best_model_at_end
    return DiskPlan(
        num_checkpoints=num_more_checkpoints(num_kept, num_saves(config, num_rows, steps, done), num_existing),
        checkpoint_bytes=_checkpoint_bytes(tensors, train.optim, _num_log_entries(train, steps)),
        adapter_bytes=sum(ADAPTER_DTYPE_BYTES * tensor.numel + TENSOR_NAMES_BYTES for tensor in tensors)
        + tokenizer_bytes,
        reference_bytes=MAX_REFERENCE_BYTES,
        num_merges=_num_merges(adapted, config, data) if config.export.merge else 0,
        merged_bytes=_merged_numel(adapted) * MERGED_DTYPE_BYTES + tokenizer_bytes,
    )


def _num_merges(adapted: AdaptedModel, config: RunConfig, data: PreparedData) -> int:
    from qlora_train.export.merging.merge_files import is_stored_in_4bit
    from qlora_train.export.merging.verify import candidate_bases

    bases, _ = candidate_bases(
        config.export.merge_base,
        stored_in_4bit=is_stored_in_4bit(adapted.loaded.source.folder),
        load_in_4bit=config.quantization.load_in_4bit,
        measured=bool(data.eval),
    )
    return len(bases)


def num_more_checkpoints(num_kept: int, num_saves: int, num_existing: int) -> int:
    """Return how many more checkpoints than now exist while one is being written; rotation keeps `num_kept`."""
    return min(num_saves, max(1, num_kept + 1 - num_existing))


def num_steps(train: TrainSection, num_rows: int | None) -> int:
    """Return the maximum steps of a run; packed rows take fewer."""
    if train.max_steps is not None:
        return train.max_steps
    if train.minutes is not None:
        return math.ceil(60 * MAX_STEPS_PER_SECOND * train.minutes)
    assert num_rows is not None, "the config asks for max_steps with a stream"
    return math.ceil(train.num_train_epochs * _steps_per_epoch(train, num_rows))


def num_saves(config: RunConfig, num_rows: int | None, steps: int, done: int) -> int:
    """Return the maximum number of checkpoints still to be written; with packing, an epoch may end at any step."""
    if done >= steps:
        return 0
    train = config.train
    every = train.save_steps or (1 if config.data.packing or num_rows is None else _steps_per_epoch(train, num_rows))
    return math.ceil(steps / every) - done // every


def _steps_per_epoch(train: TrainSection, num_rows: int) -> int:
    return math.ceil(num_rows / (train.per_device_train_batch_size * train.gradient_accumulation_steps))


def _num_log_entries(train: TrainSection, steps: int) -> int:
    evaluations = steps // train.eval_steps if train.eval_steps else math.ceil(train.num_train_epochs)
    return steps // train.logging_steps + evaluations + 1


def _checkpoint_bytes(tensors: Iterable[TrainedTensor], optimizer: str, num_log_entries: int) -> int:
    tensor_bytes = sum(
        ADAPTER_DTYPE_BYTES * tensor.numel + optimizer_state_bytes(optimizer, tensor) + TENSOR_NAMES_BYTES
        for tensor in tensors
    )
    return tensor_bytes + LOG_ENTRY_BYTES * num_log_entries + SMALL_FILES_BYTES


def _merged_numel(adapted: AdaptedModel) -> int:
    """Return the maximum number of weights of a merged model.

    A fully trained module counts beside the original, from which it may be untied; so does a head with its own adapter.
    """
    low_rank = sum(parameter.numel() for name, parameter in trainable_state(adapted.model).items() if "lora_" in name)
    head = adapted.model.get_output_embeddings()
    untied = head.weight.numel() if isinstance(head, LoraLayer) else 0
    return adapted.num_total - low_rank + untied


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
