"""The disk space that a run will take, counted before its first step: no night of training ends at a full disk.

Counted is what is still to be written: checkpoints as they stand side by side when there are most of them, the adapter,
and the merge with all its candidates. Every number is an upper bound that is close: tensors are exact, names and small
files are rounded up. Not counted: the cache of tokenised data, which is written before, and what trackers and later
evaluations write. Quotas and other processes that fill the same disk are not seen; a disk that fills up in mid-run costs
no checkpoint.
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
from qlora_train.export.merging.merge import is_stored_in_4bit
from qlora_train.export.merging.verify import candidate_bases
from qlora_train.planning.memory import ADAPTER_BYTES, COMPUTE_BYTES
from qlora_train.runs import RunFolder
from qlora_train.training.optimizer import trained_tensors
from qlora_train.utils.errors import TrainingError

NAMES_BYTES_PER_TENSOR = 1024
"""Of a trained tensor and its optimizer state: names, shapes and positions in JSON and in the heads of safetensors."""
LOGGED_BYTES = 320
"""One log line or evaluation in the history that a checkpoint holds; most have 200 to 250."""
SMALL_FILES_BYTES = 64 * 1024
"""Random generators, counters and the manifest, and the last block of every file, of which a part is empty."""
TOKEN_BYTES = 160
"""One token in tokenizer files, merges included; those of large vocabularies have 75 to 135."""


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes that a run will add to its disk at most.

    Attributes:
        num_checkpoints: most that are there at once, the one being written included, without those that are there now.
        checkpoint_bytes: of one.
        adapter_bytes: the finished adapter with its tokenizer.
        num_merges: merged models that are there at once.
        merged_bytes: of one.
        reference_bytes: what the finished adapter is compared with, deleted afterwards.
    """

    num_checkpoints: int
    checkpoint_bytes: int
    adapter_bytes: int
    num_merges: int = 0
    merged_bytes: int = 0
    reference_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(size_bytes for _, size_bytes in self.parts())

    def parts(self) -> list[tuple[str, int]]:
        """Return what is written and its bytes."""
        parts = [
            (_counted(self.num_checkpoints, "checkpoint"), self.num_checkpoints * self.checkpoint_bytes),
            ("adapter", self.adapter_bytes),
            ("adapter check", self.reference_bytes),
            ("merged model" if self.num_merges == 1 else _counted(self.num_merges, "merged model"),
             self.num_merges * self.merged_bytes),
        ]  # fmt: skip
        return [(name, size_bytes) for name, size_bytes in parts if size_bytes]


def check_disk_space(run: RunFolder, need: DiskPlan, free_bytes: int) -> None:
    """Refuse to begin what will not fit.

    Args:
        run: where it would be written.
        need: what will be written.
        free_bytes: what is free on the disk of the run folder.

    Raises:
        TrainingError: it is more than is free.
    """
    if need.total_bytes <= free_bytes:
        return
    unit, unit_bytes = _unit(need.total_bytes)

    def up(size_bytes: int) -> str:
        return f"{math.ceil(10 * size_bytes / unit_bytes) / 10:.1f} {unit}"

    parts = ", ".join(f"{name} {up(size_bytes)}" for name, size_bytes in need.parts())
    raise TrainingError(
        f"run.output_dir: needs {up(need.total_bytes)} on the disk of {run.path} ({parts}) and "
        f"{math.floor(10 * free_bytes / unit_bytes) / 10:.1f} {unit} are free; make room, lower train.save_total_limit, or "
        "choose another run.output_dir"
    )


def plan_disk(
    run: RunFolder, adapted: AdaptedModel, config: RunConfig, data: PreparedData, checkpoint: Path | None
) -> DiskPlan:
    """Count what is left to write of a run.

    Args:
        run: its folder; whole checkpoints in it will be rotated out.
        adapted: the model with its adapter, whose tensors are counted.
        config: the run's settings, with the name of its optimizer.
        data: its rows.
        checkpoint: what it goes on from, or None.
    """
    tensors = trained_tensors(adapted)
    num_here = sum(run.checkpoint_problem(step) is None for step in run.checkpoint_steps())
    done = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    steps = num_steps(config.train, data.num_train_rows)
    tokenizer_bytes = TOKEN_BYTES * len(adapted.loaded.tokenizer) + SMALL_FILES_BYTES
    kept = config.train.save_total_limit + config.train.load_best_model_at_end
    return DiskPlan(
        num_checkpoints=num_more_checkpoints(kept, num_saves(config, data.num_train_rows, steps, done), num_here),
        checkpoint_bytes=checkpoint_bytes(tensors, config.train.optim, _num_logged(config.train, steps)),
        adapter_bytes=adapter_bytes(tensors) + tokenizer_bytes,
        reference_bytes=MAX_REFERENCE_BYTES,
        num_merges=_num_merges(adapted, config, data) if config.export.merge else 0,
        merged_bytes=merged_numel(adapted) * COMPUTE_BYTES + tokenizer_bytes,
    )


# --- how many ---------------------------------------------------------------------------------------------------------


def num_more_checkpoints(num_kept: int, num_saves: int, num_here: int) -> int:
    """Return how many more checkpoints than now will be there at once, while one is being written.

    Args:
        num_kept: those that are left after each save.
        num_saves: saves to come.
        num_here: whole ones that are there.
    """
    return min(num_saves, max(1, num_kept + 1 - num_here))


def num_steps(train: TrainSection, num_rows: int | None) -> int:
    """Return the steps of a run, at most: rows that are packed take fewer."""
    if train.max_steps is not None:
        return train.max_steps
    assert num_rows is not None, "the config asks for max_steps with a stream"
    return math.ceil(train.num_train_epochs * _steps_per_epoch(train, num_rows))


def num_saves(config: RunConfig, num_rows: int | None, steps: int, done: int) -> int:
    """Return how many checkpoints are still to be written, at most: at the end of epochs of packs, any step may be one."""
    if done >= steps:
        return 0
    train = config.train
    every = train.save_steps or (1 if config.data.packing or num_rows is None else _steps_per_epoch(train, num_rows))
    return math.ceil(steps / every) - done // every


def _steps_per_epoch(train: TrainSection, num_rows: int) -> int:
    return math.ceil(num_rows / (train.per_device_train_batch_size * train.gradient_accumulation_steps))


def _num_logged(train: TrainSection, steps: int) -> int:
    evaluations = steps // train.eval_steps if train.eval_steps else math.ceil(train.num_train_epochs)
    return steps // train.logging_steps + evaluations + 1


def _num_merges(adapted: AdaptedModel, config: RunConfig, data: PreparedData) -> int:
    kinds, _ = candidate_bases(
        config.export.merge_base,
        stored_in_4bit=is_stored_in_4bit(adapted.loaded.source.folder),
        load_in_4bit=config.quantization.load_in_4bit,
        measured=bool(data.eval),
    )
    return len(kinds)


# --- how large --------------------------------------------------------------------------------------------------------


def checkpoint_bytes(tensors: Iterable[TrainedTensor], optimizer: str, num_logged: int) -> int:
    """Return the bytes of a checkpoint: the adapter, what the optimizer keeps, the history and small files."""
    of_tensors = sum(
        ADAPTER_BYTES * tensor.numel + optimizer_state_bytes(optimizer, tensor) + NAMES_BYTES_PER_TENSOR
        for tensor in tensors
    )
    return of_tensors + LOGGED_BYTES * num_logged + SMALL_FILES_BYTES


def adapter_bytes(tensors: Iterable[TrainedTensor]) -> int:
    """Return the bytes of an adapter's weights in PEFT's format."""
    return sum(ADAPTER_BYTES * tensor.numel + NAMES_BYTES_PER_TENSOR for tensor in tensors)


def merged_numel(adapted: AdaptedModel) -> int:
    """Return how many numbers a merged model has, at most.

    A module that is trained in full counts beside the original, as it does when it parts from an embedding that it shared
    its weights with; so does a head with an adapter of its own.
    """
    low_rank = sum(parameter.numel() for name, parameter in trainable_state(adapted.model).items() if "lora_" in name)
    head = adapted.model.get_output_embeddings()
    parted = head.weight.numel() if isinstance(head, LoraLayer) else 0
    return adapted.num_total - low_rank + parted


# --- for people -------------------------------------------------------------------------------------------------------


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _unit(size_bytes: int) -> tuple[str, int]:
    return ("GB", 10**9) if size_bytes >= 10**9 else ("MB", 10**6)
