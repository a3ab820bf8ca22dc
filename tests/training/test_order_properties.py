"""The position in the data is a function of seed, epoch and step, in every order."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.config import RunConfig
from qlora_train.data.batch_order import BatchOrder, RowOrder
from qlora_train.data.collate import FlatteningCollator
from qlora_train.data.packing import PackOrder
from qlora_train.training.batch_source import RowBatches

MAX_LENGTH = 32
LENGTHS = st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=60)
NO_ROWS: Any = [None]  # orders are of indices: no row is read
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def orders(draw: Any) -> tuple[BatchOrder, int]:
    """Return an order of rows or packs, and its number of rows."""
    lengths = np.array(draw(LENGTHS), np.int32)
    seed, batch_size = draw(SEEDS), draw(st.integers(1, 7))
    if draw(st.booleans()):
        return PackOrder(lengths, max_length=MAX_LENGTH, seed=seed, batch_size=batch_size), len(lengths)
    return RowOrder(lengths, seed, batch_size, draw(st.booleans()), batch_size), len(lengths)


def config_of(accumulation: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"model_name_or_path": "a/b"},
            "data": {"train": "a.jsonl"},
            "train": {"gradient_accumulation_steps": accumulation},
        }
    )


def steps_from(order: BatchOrder, accumulation: int, step: int) -> Iterator[list[list[int]]]:
    """Yield the micro-batches of each optimizer step after `step`, like a training loop that resumes there.

    The loop opens the epoch's loader and skips the earlier steps.
    """
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=step))
    source = RowBatches(NO_ROWS, order, config_of(accumulation), FlatteningCollator())
    steps = source.loader(trainer).batch_sampler
    assert steps is not None
    assert len(steps) == source.steps_per_epoch == math.ceil(len(order) / accumulation)
    while True:
        for micro_batches in islice(iter(steps), trainer.state.global_step % source.steps_per_epoch, None):
            yield micro_batches
            trainer.state.global_step += 1


@settings(max_examples=200, deadline=None)
@given(orders(), st.integers(1, 5), st.integers(0, 40))
def test_batches_after_a_resume_are_the_rest_of_the_order(
    drawn: tuple[BatchOrder, int], accumulation: int, step: int
) -> None:
    order, _ = drawn
    straight = list(islice(steps_from(order, accumulation, 0), step + 12))
    assert list(islice(steps_from(order, accumulation, step), 12)) == straight[step:]


@settings(max_examples=200, deadline=None)
@given(orders(), st.integers(0, 5), st.integers(1, 5))
def test_every_row_is_used_once_per_epoch(drawn: tuple[BatchOrder, int], epoch: int, accumulation: int) -> None:
    order, num_rows = drawn
    batches = list(order.epoch_batches(epoch))
    assert len(batches) == len(order)
    assert Counter(row for batch in batches for row in batch) == Counter(range(num_rows))
    steps_an_epoch = math.ceil(len(order) / accumulation)
    taken = islice(steps_from(order, accumulation, epoch * steps_an_epoch), steps_an_epoch)
    assert [batch for group in taken for batch in group] == batches


@settings(max_examples=100, deadline=None)
@given(LENGTHS, SEEDS, st.integers(1, 7), st.booleans(), st.integers(0, 2**31))
def test_order_of_an_epoch_depends_on_its_arguments_only(
    lengths: list[int], seed: int, batch_size: int, grouped: bool, epoch: int
) -> None:
    def made() -> list[BatchOrder]:
        array = np.array(lengths, np.int32)
        packs = PackOrder(array, max_length=MAX_LENGTH, seed=seed, batch_size=batch_size)
        return [RowOrder(array, seed, batch_size, grouped, batch_size), packs]

    for one, other in zip(made(), made(), strict=True):
        list(other.epoch_batches(epoch + 1))  # earlier calls have no effect
        np.random.default_rng().random()
        assert list(one.epoch_batches(epoch)) == list(other.epoch_batches(epoch))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, SEEDS, st.integers(0, 5))
def test_no_pack_exceeds_the_max_length(lengths: list[int], seed: int, epoch: int) -> None:
    order = PackOrder(np.array(lengths, np.int32), max_length=MAX_LENGTH, seed=seed, batch_size=1)
    packs = list(order.epoch_batches(epoch))
    assert max(sum(lengths[row] for row in pack) for pack in packs) <= MAX_LENGTH
    assert len(packs) == order.num_packs
