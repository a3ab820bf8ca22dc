"""Mismatched sequences of unpaired preferences: each prompt with the answer of another row of the optimizer step.

KTO estimates a KL divergence from them. As in TRL, their answers are those of the rows, each moved on
by one row. TRL rotates within a micro-batch; here it is within an optimizer step, whose rows are the same for any
micro-batches and processes.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from qlora_train.data.types import Example

Value = TypeVar("Value")
MISMATCHED = "mismatched_"
"""Begins the names of a batch's tensors of mismatched sequences."""


def other_rows(step: Sequence[int], step_before: Sequence[int]) -> list[tuple[int, int]]:
    """Return the rows of a step, each with the row whose answer follows its prompt: the one before it, in a circle.

    A step of one row, the last of an epoch, has the last answer of the step before.
    """
    last = step[-1] if len(step) > 1 or not step_before else step_before[-1]
    return list(zip(step, [last, *step[:-1]], strict=True))


def mismatched_sequence(row: Example, other: Example, max_length: int) -> Example:
    """Return the prompt of a row with the answer and labels of another, cut to `max_length` tokens."""
    begin, answer = row.prompt_length, other.prompt_length
    ids = np.concatenate([row.input_ids[:begin], other.input_ids[answer:]])[:max_length]
    mask = np.concatenate([np.zeros(begin, np.bool_), other.loss_mask[answer:]])[:max_length]
    return Example(row.where, ids, mask)


def mismatched_batch(batch: Mapping[str, Value]) -> dict[str, Value]:
    """Return the batch of the mismatched sequences."""
    return {name.removeprefix(MISMATCHED): each for name, each in batch.items() if name.startswith(MISMATCHED)}
