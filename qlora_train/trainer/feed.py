"""What the training loop reads: micro-batches of stored rows, padded or packed, or of a stream; the same from any step on.

Where a run stands in its data follows from its number of optimizer steps alone, so that a checkpoint holds no position.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerState

from qlora_train.config import RunConfig
from qlora_train.data.batches import (
    Batch,
    BatchOrder,
    Collator,
    NumberedExample,
    PackCollator,
    RowDataset,
    RowOrder,
    padding_multiple,
    row_multiple,
)
from qlora_train.data.packing import PackOrder
from qlora_train.data.store import Rows
from qlora_train.data.stream import RowStream
from qlora_train.data.types import Example

logger = logging.getLogger(__name__)


class Feed(Protocol):
    """The training data as the loop takes it."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; None where there is no end."""

    def loader(self, state: "Standing") -> DataLoader[Any]:
        """Return the micro-batches; iteration begins after the steps that the trainer has taken by then."""

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


class Standing(Protocol):
    """A trainer, of which a feed reads how far it is."""

    state: TrainerState


def make_feed(
    rows: Rows | RowStream, config: RunConfig, pad_token_id: int, device: torch.device, *, grouped_rows: int
) -> "RowFeed | StreamFeed":
    """Return the feed that a config asks for; how full packs are is logged. `grouped_rows` is explained in `RowOrder`."""
    if isinstance(rows, RowStream):
        return StreamFeed(rows, config, Collator(pad_token_id, padding_multiple(device)))
    if config.data.packing:
        return RowFeed(rows, pack_order(rows.lengths, config), config, PackCollator(pad_token_id, row_multiple(device)))
    train = config.train
    order = RowOrder(
        rows.lengths, config.run.seed, train.per_device_train_batch_size, train.group_by_length, grouped_rows
    )
    return RowFeed(rows, order, config, Collator(pad_token_id, padding_multiple(device)))


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


class RowFeed:
    """Rows that are tokenised already, epoch by epoch.

    Attributes:
        rows: all of them.
    """

    def __init__(self, rows: Rows, order: BatchOrder, config: RunConfig, collate: Collator | PackCollator) -> None:
        self.rows, self._order, self._config, self._collate = rows, order, config, collate

    def with_collator(self, collate: Collator | PackCollator) -> "RowFeed":
        """Return the same micro-batches, laid out in another way."""
        return RowFeed(self.rows, self._order, self._config, collate)

    def batches(self) -> Iterator[list[NumberedExample]]:
        """Yield the rows of each micro-batch of the first epoch."""
        for numbers in self._order.of_epoch(0):
            yield [(number, self.rows[number]) for number in numbers]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the last of which may have fewer micro-batches."""
        return math.ceil(len(self._order) / self._config.train.gradient_accumulation_steps)

    def loader(self, state: Standing) -> DataLoader[Any]:
        """Return the micro-batches of the epoch that the trainer is in."""
        batches = EpochBatches(state, self._order, self._config, self.steps_per_epoch)
        rows: RowDataset = RowDataset(self.rows)
        return DataLoader(rows, batch_sampler=batches, collate_fn=self._collate)

    def where(self, row: int) -> str:
        """Return the place of a row."""
        return self.rows[row].where

    def batch_of(self, rows: Sequence[Example]) -> Batch:
        """Return rows as a micro-batch in which nothing is shared."""
        collate = self._collate
        apart = replace(collate, shares=False) if isinstance(collate, PackCollator) else collate
        return apart(list(enumerate(rows)))

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens of a micro-batch's rows."""
        return int(self.rows.lengths[batch["row"].cpu().numpy()].sum())

    def memory(self) -> list[list[int]]:
        """Return nothing: the order is known."""
        return []

    def remember(self, memory: list[list[int]]) -> None:
        """Take nothing."""


class EpochBatches:
    """Batches of row numbers whose order depends on nothing but the seed and the epoch.

    The epoch is read from the trainer's step count when iteration begins, so that a resumed run needs no sampler state.
    """

    def __init__(self, trainer: Standing, order: BatchOrder, config: RunConfig, steps_per_epoch: int) -> None:
        self._trainer, self._order, self._steps_per_epoch = trainer, order, steps_per_epoch
        # the loader of a resumed run reads these two of what it skips batches of
        self.batch_size, self.drop_last = config.train.per_device_train_batch_size, False

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[int]]:
        return self._order.of_epoch(self._trainer.state.global_step // self._steps_per_epoch)


class StreamFeed(IterableDataset[Batch]):
    """An endless stream of rows in micro-batches, all full.

    Args:
        stream: the rows.
        config: the run's settings.
        collate: makes a micro-batch of rows.
    """

    def __init__(self, stream: RowStream, config: RunConfig, collate: Collator) -> None:
        self._stream, self._collate = stream, collate
        self._batch_size = config.train.per_device_train_batch_size
        self._rows_a_step = self._batch_size * config.train.gradient_accumulation_steps
        self._places: deque[tuple[int, str]] = deque(maxlen=2 * self._rows_a_step)
        self._trainer: Standing | None = None

    @property
    def steps_per_epoch(self) -> None:
        """None: it has no end."""

    def loader(self, state: Standing) -> DataLoader[Any]:
        """Return the micro-batches from the trainer's step on."""
        self._trainer = state
        return DataLoader(self, batch_size=None)

    def __iter__(self) -> Iterator[Batch]:
        assert self._trainer is not None
        start = self._trainer.state.global_step * self._rows_a_step
        numbered = zip(count(start), self._stream.rows(start), strict=False)
        while True:
            rows = list(islice(numbered, self._batch_size))
            self._places.extend((number, example.where) for number, example in rows)
            yield self._collate(rows)

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
