"""What the training loop reads: optimizer steps, each as its micro-batches, of stored rows or of a stream.

They are the same from any step on: where a run stands in its data follows from its number of optimizer steps alone, so
that a checkpoint holds no position.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerState

from qlora_train.config import RunConfig
from qlora_train.data.batch_order import BatchOrder, RowOrder
from qlora_train.data.collate import (
    Batch,
    FlatteningCollator,
    IndexedExample,
    PaddingCollator,
    RowDataset,
    StepCollator,
    TokenBudget,
    flattened_multiple,
    padding_multiple,
)
from qlora_train.data.packing import PackOrder
from qlora_train.data.streaming import RowStream
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example

logger = logging.getLogger(__name__)


class BatchSource(Protocol):
    """The training data as the loop takes it."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; None where there is no end."""

    def loader(self, state: "HasTrainerState") -> DataLoader[Any]:
        """Return the micro-batches of each step; iteration begins after the steps that the trainer has taken by then."""

    def where(self, row: int) -> str:
        """Return the place of a row of the last step, by the number that its batch gives it."""

    def batch_of(self, rows: Sequence[Example]) -> Batch:
        """Return rows as a micro-batch in which each computes all of its tokens."""

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens of a micro-batch's rows, padding not counted."""

    def memory(self) -> list[list[int]]:
        """Return what a checkpoint should hold so that a resumed run need not find it out again."""

    def remember(self, memory: list[list[int]]) -> None:
        """Take what a checkpoint held."""


class HasTrainerState(Protocol):
    """A trainer, of which a feed reads how far it is."""

    state: TrainerState


def make_batch_source(
    rows: Rows | RowStream, config: RunConfig, pad_token_id: int, device: torch.device, *, group_batch_size: int
) -> "RowBatches | StreamBatches":
    """Return the batch source of a config. `group_batch_size`: see `RowOrder`."""
    if isinstance(rows, RowStream):
        return StreamBatches(rows, config, PaddingCollator(pad_token_id, padding_multiple(device)))
    if config.data.packing:
        return RowBatches(
            rows, pack_order(rows.lengths, config), config, FlatteningCollator(pad_token_id, flattened_multiple(device))
        )
    train = config.train
    order = RowOrder(
        rows.lengths, config.run.seed, train.per_device_train_batch_size, train.group_by_length, group_batch_size
    )
    return RowBatches(rows, order, config, PaddingCollator(pad_token_id, padding_multiple(device)))


def pack_order(lengths: npt.NDArray[np.int32], config: RunConfig) -> PackOrder:
    """Return how rows of these lengths, (num_rows,), are packed."""
    packs = PackOrder(
        lengths, max_length=config.data.max_length, seed=config.run.seed,
        batch_size=config.train.per_device_train_batch_size,
    )  # fmt: skip
    logger.info(
        "packing: %d rows in %d packs of %d tokens, %.1f %% full",
        len(lengths), packs.num_packs, config.data.max_length, 100 * packs.efficiency,
    )  # fmt: skip
    return packs


class RowBatches:
    """Rows that are tokenised already, epoch by epoch.

    Attributes:
        rows: all of them.
        collate: makes the micro-batches of a step.
    """

    def __init__(
        self,
        rows: Rows,
        order: BatchOrder,
        config: RunConfig,
        collate: PaddingCollator | FlatteningCollator,
        most: TokenBudget | None = None,
    ) -> None:
        self.rows, self._order, self._config = rows, order, config
        self.collate = StepCollator(collate, most)

    def laid_out(self, collate: FlatteningCollator, most: TokenBudget | None = None) -> "RowBatches":
        """Return the same steps, laid out in another way; `most` is explained in `StepCollator`."""
        return RowBatches(self.rows, self._order, self._config, collate, most)

    def steps(self) -> Iterator[list[list[IndexedExample]]]:
        """Yield the rows of each step of the first epoch, in the micro-batches that the settings ask for."""
        rows = RowDataset(self.rows)
        for numbers in self._batches().epoch_batches(0):
            yield [rows[micro_batch] for micro_batch in numbers]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the last of which may have fewer micro-batches."""
        return len(self._batches())

    def _batches(self) -> "StepOrder":
        return StepOrder(self._order, self._config.train.gradient_accumulation_steps)

    def loader(self, state: HasTrainerState) -> DataLoader[Any]:
        """Return the micro-batches of each step of the epoch that the trainer is in."""
        rows, steps = RowDataset(self.rows), EpochSteps(state, self._batches())
        return DataLoader(rows, batch_sampler=steps, collate_fn=self.collate)

    def where(self, row: int) -> str:
        """Return the place of a row."""
        return self.rows[row].where

    def batch_of(self, rows: Sequence[Example]) -> Batch:
        """Return rows as a micro-batch in which nothing is shared."""
        collate = self.collate.collate
        apart = replace(collate, share_prefixes=False) if isinstance(collate, FlatteningCollator) else collate
        return apart(list(enumerate(rows)))

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens of a micro-batch's rows."""
        return int(self.rows.lengths[batch["row"].cpu().numpy()].sum())

    def memory(self) -> list[list[int]]:
        """Return nothing: the order is known."""
        return []

    def remember(self, memory: list[list[int]]) -> None:
        """Take nothing."""


@dataclass(frozen=True, slots=True)
class StepOrder:
    """The micro-batches of every epoch, `accumulation` to an optimizer step; the last of an epoch may have fewer."""

    order: BatchOrder
    accumulation: int

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.accumulation)

    def epoch_batches(self, epoch: int) -> Iterator[list[list[int]]]:
        """Yield the row numbers of each micro-batch of each step."""
        micro_batches = self.order.epoch_batches(epoch)
        while step := list(islice(micro_batches, self.accumulation)):
            yield step


class EpochSteps:
    """The steps of the epoch that a trainer is in, whose order depends on nothing but the seed and the epoch.

    The epoch is read from the trainer's step count when iteration begins, so that a resumed run needs no sampler state.
    """

    batch_size, drop_last = 1, False
    """The loader of a resumed run reads these two of what it skips steps of."""

    def __init__(self, trainer: HasTrainerState, order: StepOrder) -> None:
        self._trainer, self._order = trainer, order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self._order.epoch_batches(self._trainer.state.global_step // len(self._order))


class StreamBatches(IterableDataset[list[Batch]]):
    """An endless stream of rows in steps of micro-batches, all full.

    Args:
        stream: the rows.
        config: the run's settings.
        collate: makes a micro-batch of rows.
    """

    def __init__(self, stream: RowStream, config: RunConfig, collate: PaddingCollator) -> None:
        self._stream, self._collate = stream, collate
        self._batch_size = config.train.per_device_train_batch_size
        self._rows_a_step = self._batch_size * config.train.gradient_accumulation_steps
        self._places: deque[tuple[int, str]] = deque(maxlen=2 * self._rows_a_step)
        self._trainer: HasTrainerState | None = None

    @property
    def steps_per_epoch(self) -> None:
        """None: it has no end."""

    def loader(self, state: HasTrainerState) -> DataLoader[Any]:
        """Return the micro-batches of each step from the trainer's on."""
        self._trainer = state
        return DataLoader(self, batch_size=None)

    def __iter__(self) -> Iterator[list[Batch]]:
        assert self._trainer is not None
        start = self._trainer.state.global_step * self._rows_a_step
        numbered = zip(count(start), self._stream.rows(start), strict=False)
        while True:
            rows = list(islice(numbered, self._rows_a_step))
            self._places.extend((number, example.where) for number, example in rows)
            yield [
                self._collate(rows[begin : begin + self._batch_size]) for begin in range(0, len(rows), self._batch_size)
            ]

    def where(self, row: int) -> str:
        """Return the place of a row of the last step."""
        return dict(self._places)[row]

    def batch_of(self, rows: Sequence[Example]) -> Batch:
        """Return rows as a micro-batch."""
        return self._collate(list(enumerate(rows)))

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens of a micro-batch's rows."""
        return int(batch["attention_mask"].sum())

    def memory(self) -> list[list[int]]:
        """Return what each window that was tokenised so far gave."""
        return list(self._stream.counts)

    def remember(self, memory: list[list[int]]) -> None:
        """Take what each window gave that an earlier part of the run tokenised."""
        self._stream.counts = list(memory)
