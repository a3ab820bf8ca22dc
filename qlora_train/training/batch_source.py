"""Batch sources: the optimizer steps of a run, each a list of micro-batches, from stored rows or from a stream.

The position in the data is a function of the number of optimizer steps, so a checkpoint does not store it.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import TrainerState

from qlora_train.config import RunConfig
from qlora_train.config.objectives import OBJECTIVES
from qlora_train.config.schema import TrainSection
from qlora_train.data.batch_order import RowOrder, UnitOrder
from qlora_train.data.collate import (
    Batch,
    FlatteningCollator,
    IndexedExample,
    MismatchedRowDataset,
    PaddingCollator,
    RowDataset,
    StepCollator,
    TokenBudget,
    collate_rows,
    flattened_multiple,
    padding_multiple,
)
from qlora_train.data.mismatched_rows import other_rows
from qlora_train.data.packing import PackOrder
from qlora_train.data.rank_shares import share_of
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example
from qlora_train.parallel import context
from qlora_train.utils.errors import ConfigError

if TYPE_CHECKING:
    from qlora_train.data.streaming import RowStream

Unit = TypeVar("Unit")
logger = logging.getLogger(__name__)


class HasTrainerState(Protocol):
    """A trainer, whose `global_step` a batch source reads."""

    state: TrainerState


def make_batch_source(
    rows: "Rows | RowStream", config: RunConfig, pad_token_id: int, device: torch.device, *, group_batch_size: int
) -> "BatchSource":
    """Return the batch source of a config. `group_batch_size`: see `RowOrder`."""
    pad = PaddingCollator(pad_token_id, padding_multiple(device))
    if not isinstance(rows, Rows):
        return StreamBatches(rows, config, pad)
    if config.data.packing:
        flatten = FlatteningCollator(pad_token_id, flattened_multiple(device))
        return RowBatches(rows, pack_order(rows.lengths, config), config, flatten)
    train = config.train
    order = RowOrder(rows.lengths, config.run.seed, train.group_by_length, group_batch_size)
    source = MismatchedRowBatches if OBJECTIVES[train.objective].estimates_kl else RowBatches
    return source(rows, order, config, pad)


def pack_order(lengths: npt.NDArray[np.int32], config: RunConfig) -> PackOrder:
    """Pack rows of these lengths, (num_rows,)."""
    packs = PackOrder(lengths, max_length=config.data.max_length, seed=config.run.seed)
    if packs.num_packs < context().world_size:
        raise ConfigError(
            f"data.packing: the rows are {packs.num_packs} packs for {context().world_size} processes; lower "
            "parallel.processes, or set data.packing to false"
        )
    logger.info(
        "packing: %d rows in %d packs of %d tokens, %.1f %% full",
        len(lengths), packs.num_packs, config.data.max_length, 100 * packs.efficiency,
    )  # fmt: skip
    return packs


class RowBatches:
    """This rank's share of the steps of tokenised rows, epoch by epoch; the last step of an epoch may have fewer rows."""

    def __init__(
        self,
        rows: Rows,
        order: UnitOrder,
        config: RunConfig,
        collate: PaddingCollator | FlatteningCollator,
        budget: TokenBudget | None = None,
    ) -> None:
        self.rows, self.order, self._config = rows, order, config
        self.collate = StepCollator(collate, budget)

    def with_collator(self, collate: FlatteningCollator, budget: TokenBudget | None = None) -> "RowBatches":
        """Return the same steps with another collator; `budget`: see `StepCollator`."""
        return type(self)(self.rows, self.order, self._config, collate, budget)

    def dataset(self) -> Dataset[list[IndexedExample]]:
        """Return the rows by the items of `epoch_steps`."""
        return RowDataset(self.rows)

    def steps(self) -> Iterator[list[list[IndexedExample]]]:
        """Yield the rows of each step of the first epoch, in the micro-batches of the settings."""
        rows = self.dataset()
        for step in self.epoch_steps(0):
            yield [rows[items] for items in step]

    def any_batch(self) -> Batch:
        """Return a micro-batch of this rank; the first step has rows on every rank."""
        return self.collate(next(self.steps()))[0]

    def epoch_steps(self, epoch: int) -> Iterator[list[list[Any]]]:
        """Yield the row indices of each micro-batch of each step; a rank may have none in the last step."""
        units = self.order.epoch_units(epoch)
        before: list[list[int]] = []
        while step := list(islice(units, units_per_step(self._config.train))):
            sizes = [int(self.rows.lengths[unit].sum()) for unit in step]
            items = self._items(step, before)
            yield [list(chain.from_iterable(rows)) for rows in _micro_batches(items, sizes, self._config.train)]
            before = step

    def _items(self, step: list[list[int]], before: list[list[int]]) -> Sequence[Sequence[Any]]:
        """Return what `dataset` takes for the units of a step, given the step before it in the epoch."""
        return step

    def trained_rows(self, num_steps: int) -> Sequence[Example]:
        """Return the rows that the first steps train, each once."""
        if num_steps >= self.steps_per_epoch:
            return self.rows
        return self.rows.select(self.are_trained(num_steps))

    def are_trained(self, num_steps: int) -> npt.NDArray[np.bool_]:
        """Return for each row whether the first steps train it, (num_rows,)."""
        units = islice(self.order.epoch_units(0), num_steps * units_per_step(self._config.train))
        trained = np.zeros(len(self.rows), np.bool_)
        trained[list(chain.from_iterable(units))] = True
        return trained

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(len(self.order) / units_per_step(self._config.train))

    def loader(self, trainer: HasTrainerState) -> DataLoader[Any]:
        """Return the steps of the trainer's current epoch."""
        return DataLoader(self.dataset(), batch_sampler=_EpochSampler(trainer, self), collate_fn=self.collate)

    def location(self, row: int) -> str:
        """Return the source location of a row, by its index in a batch's `row`."""
        return self.rows[row].where

    def collate_unshared(self, rows: Sequence[Example]) -> Batch:
        """Return rows as one micro-batch without shared prefixes."""
        collate = self.collate.collate
        if isinstance(collate, FlatteningCollator):
            collate = replace(collate, share_prefixes=False)
        return collate_rows(collate, list(enumerate(rows)))

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens of a micro-batch's rows, without padding."""
        return int(self.rows.lengths[np.unique(batch["row"].cpu().numpy())].sum())  # a pair has two

    def state(self) -> list[list[int]]:
        """Return the state for a checkpoint: nothing, since the order is a function of the step."""
        return []

    def restore(self, state: list[list[int]]) -> None:
        """Do nothing."""


class MismatchedRowBatches(RowBatches):
    """Steps of unpaired preferences, each with the answer of another row of its step."""

    def dataset(self) -> Dataset[list[IndexedExample]]:
        """Return the rows by the items of `epoch_steps`."""
        return MismatchedRowDataset(self.rows, self._config.data.max_length)

    def _items(self, step: list[list[int]], before: list[list[int]]) -> Sequence[Sequence[Any]]:
        """Return (row, row of the other answer) of each row."""
        rows = other_rows([row for [row] in step], [row for [row] in before])
        return [[item] for item in rows]


class _EpochSampler:
    """Batch sampler whose epoch follows from the trainer's step when iteration begins."""

    batch_size, drop_last = 1, False  # read by the loader that skips the steps before a checkpoint

    def __init__(self, trainer: HasTrainerState, source: RowBatches) -> None:
        self._trainer, self._source = trainer, source

    def __len__(self) -> int:
        return self._source.steps_per_epoch

    def __iter__(self) -> Iterator[list[list[Any]]]:
        return self._source.epoch_steps(self._trainer.state.global_step // len(self))


class StreamBatches(IterableDataset[list[Batch]]):
    """This rank's share of the steps of an endless stream, all of the same number of rows."""

    steps_per_epoch: None = None

    def __init__(self, stream: "RowStream", config: RunConfig, collate: PaddingCollator) -> None:
        self.stream, self._collate = stream, collate
        self._train, self._rows_per_step = config.train, units_per_step(config.train)
        self._locations: deque[tuple[int, str]] = deque(maxlen=2 * self._rows_per_step)
        self._trainer: HasTrainerState | None = None

    def loader(self, trainer: HasTrainerState) -> DataLoader[Any]:
        """Return the steps from the trainer's current step on."""
        self._trainer = trainer
        return DataLoader(self, batch_size=None)

    def __iter__(self) -> Iterator[list[Batch]]:
        assert self._trainer is not None
        start = self._trainer.state.global_step * self._rows_per_step
        indexed = zip(count(start), self.stream.rows(start), strict=False)
        while True:
            rows = list(islice(indexed, self._rows_per_step))
            self._locations.extend((index, example.where) for index, example in rows)
            sizes = [example.num_tokens for _, example in rows]
            yield [collate_rows(self._collate, batch) for batch in _micro_batches(rows, sizes, self._train)]

    def trained_rows(self, num_steps: int) -> Sequence[Example]:
        """Return the rows at the beginning of the stream that the first steps train."""
        return self.stream.head()[: num_steps * self._rows_per_step]

    def any_batch(self) -> Batch:
        """Never called: all steps are full, so that every rank has rows."""
        raise AssertionError("a rank without rows in a step of a stream")

    def location(self, row: int) -> str:
        """Return the source location of a row of the last step."""
        return dict(self._locations)[row]

    def collate_unshared(self, rows: Sequence[Example]) -> Batch:
        """Return rows as one micro-batch."""
        return collate_rows(self._collate, list(enumerate(rows)))

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens of a micro-batch's rows."""
        return int(batch["attention_mask"].sum())

    def state(self) -> list[list[int]]:
        """Return the row counts of the windows tokenised so far."""
        return list(self.stream.counts)

    def restore(self, state: list[list[int]]) -> None:
        """Restore the row counts of windows that an earlier process tokenised."""
        self.stream.counts = list(state)


BatchSource = RowBatches | StreamBatches


def units_per_step(train: TrainSection) -> int:
    """Return the rows, or packs, of an optimizer step, over all ranks."""
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


def _micro_batches(units: Sequence[Unit], sizes: Sequence[int], train: TrainSection) -> list[Sequence[Unit]]:
    """Return the micro-batches of this rank's share of a step's units; `sizes` are their tokens."""
    this, batch_size = context(), train.per_device_train_batch_size
    share = share_of(units, sizes, this.rank, this.world_size)
    return [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
