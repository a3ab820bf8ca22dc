"""What a run computes: its largest micro-batches, steps and tokens, from the data's lengths or from the config alone.

Without data every row counts as `data.max_length` tokens, all of them labels. No torch.
"""

import heapq
from dataclasses import dataclass
from typing import Any

from qlora_train.config import RunConfig
from qlora_train.config.objectives import OBJECTIVES, dataset_type_of, uses_reference
from qlora_train.planning.activations import MicroBatch
from qlora_train.planning.disk_plan import num_steps
from qlora_train.utils.constants import GPU_TOKENS


@dataclass(frozen=True, slots=True)
class RowSizes:
    """Sizes of a run's rows; a pair counts both sequences, padded to the longer.

    Attributes:
        num_rows: training rows; None if unknown.
        num_tokens: of all training rows; None if unknown.
        longest: tokens of the longest row.
        longest_sequence: the same, of one sequence of a pair.
        step_tokens: tokens of the longest rows that a step can have.
        step_labels: the same for labels.
        most_labels: labels of the row with most.
        longest_eval: tokens of the longest row whose loss is measured; 0: there is none.
        varies: rows have different lengths.
    """

    num_rows: int | None
    num_tokens: int | None
    longest: int
    longest_sequence: int
    step_tokens: int
    step_labels: int
    most_labels: int
    longest_eval: int
    varies: bool

    @classmethod
    def most(cls, config: RunConfig) -> "RowSizes":
        """Return the largest sizes that a config allows."""
        rows_per_step = _rows_per_step(config)
        sequences = 2 if dataset_type_of(config.train.objective) == "preference" else 1
        length = config.data.max_length
        return cls(
            num_rows=None,
            num_tokens=None,
            longest=sequences * length,
            longest_sequence=length,
            step_tokens=rows_per_step * sequences * length,
            step_labels=rows_per_step * sequences * length,
            most_labels=sequences * length,
            longest_eval=sequences * length if _evaluates(config) else 0,
            varies=True,
        )

    @classmethod
    def of(cls, config: RunConfig, data: Any) -> "RowSizes":
        """Return the sizes of prepared data (`data.PreparedData`); of a stream, the largest that the config allows."""
        if data.num_train_rows is None:
            return cls.most(config)
        rows, rows_per_step = data.train, _rows_per_step(config)
        return cls(
            num_rows=len(rows),
            num_tokens=int(rows.lengths.sum(dtype="int64")),
            longest=int(rows.padded_lengths.max()),
            longest_sequence=int(rows.max_lengths.max()),
            step_tokens=_sum_of_largest(rows.lengths, rows_per_step),
            step_labels=_sum_of_largest(rows.num_labels, rows_per_step),
            most_labels=int(rows.num_labels.max()),
            longest_eval=max(
                int(rows.padded_lengths.max()) if config.run.row_losses else 0,
                max((row.num_tokens for row in data.eval), default=0),
            ),
            varies=bool(rows.lengths.min() < rows.lengths.max()),
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a run on one rank.

    Attributes:
        batch: the largest micro-batch of the settings.
        raised_batch: the largest with a raised token budget (padding-free on a GPU); None: there is none.
        num_rows: rows of the largest micro-batch.
        eval_batch: None: no evaluation.
        num_micro_batches: per step and rank, of the settings.
        num_steps: optimizer steps; None if unknown.
        num_tokens: of all steps; None if unknown.
        varies: micro-batches have different lengths.
        reference_tokens: of training rows whose reference log-probabilities are computed before step 1; None if unknown.
        step_reference_tokens: of the passes without gradients for each micro-batch: the reference model's, if it is not
            computed before step 1, and those of KTO's KL estimate; None if unknown.
    """

    batch: MicroBatch
    raised_batch: MicroBatch | None
    num_rows: int
    eval_batch: MicroBatch | None
    num_micro_batches: int
    num_steps: int | None
    num_tokens: int | None
    varies: bool
    reference_tokens: int | None = 0
    step_reference_tokens: int | None = 0


def plan_workload(config: RunConfig, sizes: RowSizes, *, on_gpu: bool, num_ranks: int = 1) -> Workload:
    """Return the work of one rank."""
    train, packs = config.train, config.data.packing
    rows_of_rank = -(-_rows_per_step(config) // num_ranks)
    num_rows = min(train.per_device_train_batch_size, rows_of_rank, sizes.num_rows or rows_of_rank)
    length = config.data.max_length if packs else sizes.longest
    tokens = num_rows * length
    labels = tokens if packs else num_rows * sizes.most_labels
    batch = MicroBatch(tokens, min(sizes.longest_sequence, length), min(tokens, labels))
    raised = min(GPU_TOKENS, sizes.step_tokens)
    raises = on_gpu and pads_nothing(config) and not packs and not config.run.deterministic and raised > tokens
    steps = num_steps(train, sizes.num_rows) if _knows_steps(config, sizes) else None
    num_tokens = _num_tokens(config, sizes, steps)
    once, each_step = _reference_tokens(config, sizes, num_tokens)
    return Workload(
        batch=batch,
        raised_batch=MicroBatch(raised, batch.longest_row, min(raised, sizes.step_labels)) if raises else None,
        num_rows=num_rows,
        eval_batch=_eval_batch(config, sizes, steps),
        num_micro_batches=-(-rows_of_rank // num_rows),
        num_steps=steps,
        num_tokens=num_tokens,
        varies=sizes.varies and not packs,
        reference_tokens=once,
        step_reference_tokens=each_step,
    )


def pads_nothing(config: RunConfig) -> bool:
    """Return whether the settings allow padding-free training."""
    train = config.train
    return train.padding_free and train.fused_kernels and not train.neftune_noise_alpha


def _rows_per_step(config: RunConfig) -> int:
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps


def _sum_of_largest(sizes: Any, count: int) -> int:
    """Return the sum of the largest of an array's numbers."""
    return sum(heapq.nlargest(count, sizes.tolist()))


def _eval_batch(config: RunConfig, sizes: RowSizes, steps: int | None) -> MicroBatch | None:
    if not sizes.longest_eval:
        return None
    num_rows = config.train.per_device_eval_batch_size
    if config.data.eval is None and steps is not None:  # rows that were trained
        num_rows = min(num_rows, steps * _rows_per_step(config), sizes.num_rows or num_rows)
    tokens = num_rows * sizes.longest_eval
    share = sizes.most_labels / sizes.longest
    return MicroBatch(tokens, sizes.longest_eval, round(tokens * min(1.0, share)))


def _evaluates(config: RunConfig) -> bool:
    """Return whether losses of rows are measured: of held-out rows, and at the end of a sample of training rows."""
    return config.data.eval is not None or bool(config.run.row_losses)


def _knows_steps(config: RunConfig, sizes: RowSizes) -> bool:
    return config.train.minutes is None and (config.train.max_steps is not None or sizes.num_rows is not None)


def _num_tokens(config: RunConfig, sizes: RowSizes, steps: int | None) -> int | None:
    if sizes.num_tokens is None or sizes.num_rows is None or steps is None:
        return None
    rows = steps * _rows_per_step(config)
    return round(sizes.num_tokens * min(rows / sizes.num_rows, _num_epochs(config, sizes, steps)))


def _reference_tokens(config: RunConfig, sizes: RowSizes, num_tokens: int | None) -> tuple[int | None, int | None]:
    """Return the tokens of passes without gradients, before step 1 and during the steps."""
    train = config.train
    if not uses_reference(train.objective):
        return 0, 0
    if num_tokens is None or sizes.num_tokens is None:
        return None, None
    num_passes = 2 if OBJECTIVES[train.objective].estimates_kl else 0  # policy and reference, mismatched sequences
    if train.precompute_ref_log_probs is False or train.minutes is not None:
        return 0, (num_passes + 1) * num_tokens
    return min(num_tokens, sizes.num_tokens), num_passes * num_tokens


def _num_epochs(config: RunConfig, sizes: RowSizes, steps: int) -> float:
    if config.train.max_steps is None:
        return config.train.num_train_epochs
    assert sizes.num_rows is not None
    return steps * _rows_per_step(config) / sizes.num_rows
