"""Estimate the disk space of a run. No torch.

Counted are the checkpoints that exist at the same time, the adapter, and the merge with all its candidates. Every number is
a close upper bound: tensors are exact, names and small files are rounded up. Not counted are the cache of tokenised data
(written before), trackers, later evaluations, quotas and other processes; a disk that fills up costs no checkpoint.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_train.config import RunConfig
from qlora_train.config.optimizers import TrainedTensor, optimizer_state_bytes
from qlora_train.config.schema import TrainSection
from qlora_train.export.candidate_bases import candidate_bases
from qlora_train.export.check_sizes import MAX_REFERENCE_BYTES

ADAPTER_DTYPE_BYTES, MERGED_DTYPE_BYTES = 4, 2
TENSOR_NAMES_BYTES = 1024
"""Per trained tensor and its optimizer state: names, shapes and offsets in JSON and in safetensors headers."""
LOG_ENTRY_BYTES = 400
"""Per entry of the log history in a checkpoint; most have 280 to 330."""
SMALL_FILES_BYTES = 64 * 1024
"""RNG state, counters, manifest, and the unused part of each file's last block."""
REPORT_BYTES = 1 << 20
"""report.html and row_losses.json; most have 200 to 500 kB together."""
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
        report_bytes: report.html and row_losses.json.
    """

    num_checkpoints: int
    checkpoint_bytes: int
    adapter_bytes: int
    num_merges: int = 0
    merged_bytes: int = 0
    reference_bytes: int = 0
    report_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(size_bytes for _, size_bytes in self.parts())

    def parts(self) -> list[tuple[str, int]]:
        """Return name and bytes of each part."""
        parts = [
            (_plural(self.num_checkpoints, "checkpoint"), self.num_checkpoints * self.checkpoint_bytes),
            ("adapter", self.adapter_bytes),
            ("report", self.report_bytes),
            ("adapter check", self.reference_bytes),
            ("merged model" if self.num_merges == 1 else _plural(self.num_merges, "merged model"),
             self.num_merges * self.merged_bytes),
        ]  # fmt: skip
        return [(name, size_bytes) for name, size_bytes in parts if size_bytes]


@dataclass(frozen=True, slots=True)
class RunSize:
    """What of a run determines its files.

    Attributes:
        tensors: that are trained.
        num_tokens: of the tokenizer.
        merged_numel: weights of a merged model.
        num_rows: training rows; None for a stream.
        has_eval: rows are held out.
        stored_in_4bit: the base has no original weights.
    """

    tensors: Sequence[TrainedTensor]
    num_tokens: int
    merged_numel: int
    num_rows: int | None
    has_eval: bool
    stored_in_4bit: bool


def estimate_disk(config: RunConfig, size: RunSize, *, num_existing: int = 0, done: int = 0) -> DiskPlan:
    """Estimate what a run still writes.

    Args:
        config: with the resolved optimizer.
        size: of the run.
        num_existing: complete checkpoints that exist now.
        done: steps before the checkpoint that it resumes from.
    """
    train = config.train
    steps = num_steps(train, size.num_rows)
    tokenizer_bytes = TOKEN_BYTES * size.num_tokens + SMALL_FILES_BYTES
    num_kept = train.save_total_limit + train.load_best_model_at_end
    return DiskPlan(
        num_checkpoints=num_more_checkpoints(num_kept, num_saves(config, size.num_rows, steps, done), num_existing),
        checkpoint_bytes=_checkpoint_bytes(size.tensors, train.optim, _num_log_entries(train, steps)),
        adapter_bytes=sum(ADAPTER_DTYPE_BYTES * tensor.numel + TENSOR_NAMES_BYTES for tensor in size.tensors)
        + tokenizer_bytes,
        reference_bytes=MAX_REFERENCE_BYTES,
        report_bytes=REPORT_BYTES,
        num_merges=_num_merges(config, size) if config.export.merge else 0,
        merged_bytes=size.merged_numel * MERGED_DTYPE_BYTES + tokenizer_bytes,
    )


def _num_merges(config: RunConfig, size: RunSize) -> int:
    bases, _ = candidate_bases(
        config.export.merge_base, stored_in_4bit=size.stored_in_4bit,
        load_in_4bit=config.quantization.load_in_4bit, measured=size.has_eval,
    )  # fmt: skip
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


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
