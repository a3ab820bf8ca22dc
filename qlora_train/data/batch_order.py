"""The order of an epoch as a pure function of lengths, seed and epoch: a checkpoint holds no sampler state.

An order consists of units: rows, or packs of rows, which no micro-batch divides.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

MEGABATCH_BATCHES = 50
"""Batches whose rows `group_by_length` sorts together: enough to match lengths, few enough to mix rows."""


class UnitOrder(Protocol):
    """The units of every epoch, each a list of row indices."""

    def __len__(self) -> int:
        """Return the number of units of an epoch, the same for each."""

    def epoch_units(self, epoch: int) -> Iterator[list[int]]:
        """Yield the units of an epoch, counted from 0."""


@dataclass(frozen=True, slots=True, eq=False)
class RowOrder:
    """Single rows in the order of `epoch_order`.

    `group_batch_size` is the batch size that `group_by_length` sorts for: a run whose batch size was lowered to fit into
    memory keeps its order of rows.
    """

    lengths: npt.NDArray[np.int32]
    seed: int
    group_by_length: bool
    group_batch_size: int

    def __len__(self) -> int:
        return len(self.lengths)

    def epoch_units(self, epoch: int) -> Iterator[list[int]]:
        """Yield the rows of an epoch."""
        order = epoch_order(
            self.lengths, seed=self.seed, epoch=epoch, batch_size=self.group_batch_size,
            group_by_length=self.group_by_length,
        )  # fmt: skip
        for row in order.tolist():
            yield [row]


def epoch_order(
    lengths: npt.NDArray[np.int32], *, seed: int, epoch: int, batch_size: int, group_by_length: bool
) -> npt.NDArray[np.int64]:
    """Return the order of the rows in an epoch, int64 (num_rows,).

    With `group_by_length`, shuffled rows are cut into megabatches of MEGABATCH_BATCHES batches and sorted by length
    within each; then the whole batches are shuffled. A last batch that is not full stays last, so that every batch that
    a loader cuts from the order holds rows of similar length.

    Args:
        lengths: tokens of each row, (num_rows,).
        epoch: from 0.
        batch_size: rows of a batch.
        group_by_length: batch rows of similar length.
    """
    import torch

    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: npt.NDArray[np.int64] = torch.randperm(len(lengths), generator=generator).numpy()
    if not group_by_length:
        return order
    width = batch_size * MEGABATCH_BATCHES
    for begin in range(0, len(order), width):
        megabatch = order[begin : begin + width]
        order[begin : begin + width] = megabatch[np.argsort(-lengths[megabatch], kind="stable")]
    num_full = len(lengths) // batch_size
    full, rest = order[: num_full * batch_size].reshape(num_full, batch_size), order[num_full * batch_size :]
    return np.concatenate([full[torch.randperm(num_full, generator=generator).numpy()].ravel(), rest])
