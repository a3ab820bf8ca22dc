"""The position in the data is a function of seed, epoch and step, in every order."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.config import RunConfig
from qlora_train.data.batch_order import RowOrder, UnitOrder
from qlora_train.data.collate import FlatteningCollator
from qlora_train.data.packing import PackOrder
from qlora_train.training.batch_source import RowBatches

MAX_LENGTH = 32
LENGTHS = st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def sources(draw: Any) -> RowBatches:
    """Return the steps of an order of rows or packs."""
    lengths = np.array(draw(LENGTHS), np.int32)
    seed, batch_size, accumulation = draw(SEEDS), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    order: UnitOrder
    if draw(st.booleans()):
        order = PackOrder(lengths, max_length=MAX_LENGTH, seed=seed)
    else:
        order = RowOrder(lengths, seed, draw(st.booleans()), batch_size)
    rows: Any = SimpleNamespace(lengths=lengths)  # orders are of indices: no row is read
    return RowBatches(rows, order, config_of(batch_size, accumulation), FlatteningCollator())


def config_of(batch_size: int, accumulation: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"model_name_or_path": "a/b"},
            "data": {"train": "a.jsonl"},
            "train": {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation},
        }
    )


def steps_from(source: RowBatches, step: int) -> Iterator[list[list[int]]]:
    """Yield the micro-batches of each optimizer step after `step`, like a training loop that resumes there.

    The loop opens the epoch's loader and skips the earlier steps.
    """
    trainer: Any = SimpleNamespace(state=SimpleNamespace(global_step=step))
    steps = source.loader(trainer).batch_sampler
    assert steps is not None
    assert len(steps) == source.steps_per_epoch
    while True:
        for micro_batches in islice(iter(steps), trainer.state.global_step % source.steps_per_epoch, None):
            yield micro_batches
            trainer.state.global_step += 1


@settings(max_examples=200, deadline=None)
@given(sources(), st.integers(0, 40))
def test_batches_after_a_resume_are_the_rest_of_the_order(source: RowBatches, step: int) -> None:
    straight = list(islice(steps_from(source, 0), step + 12))
    assert list(islice(steps_from(source, step), 12)) == straight[step:]


@settings(max_examples=200, deadline=None)
@given(sources(), st.integers(0, 5))
def test_steps_are_cut_from_the_order_of_their_epoch(source: RowBatches, epoch: int) -> None:
    units = list(source.order.epoch_units(epoch))
    assert len(units) == len(source.order)
    assert Counter(chain.from_iterable(units)) == Counter(range(len(source.rows.lengths)))
    steps = list(islice(steps_from(source, epoch * source.steps_per_epoch), source.steps_per_epoch))
    assert [*chain.from_iterable(chain.from_iterable(steps))] == [*chain.from_iterable(units)]
    train = source._config.train
    assert all(len(step) == train.gradient_accumulation_steps for step in steps[:-1])
    assert len(steps) == math.ceil(len(units) / (train.per_device_train_batch_size * train.gradient_accumulation_steps))
    if isinstance(source.order, RowOrder):
        assert all(len(batch) == train.per_device_train_batch_size for step in steps[:-1] for batch in step)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, SEEDS, st.integers(1, 7), st.booleans(), st.integers(0, 2**31))
def test_order_of_an_epoch_depends_on_its_arguments_only(
    lengths: list[int], seed: int, batch_size: int, grouped: bool, epoch: int
) -> None:
    def made() -> list[UnitOrder]:
        array = np.array(lengths, np.int32)
        packs = PackOrder(array, max_length=MAX_LENGTH, seed=seed)
        return [RowOrder(array, seed, grouped, batch_size), packs]

    for one, other in zip(made(), made(), strict=True):
        list(other.epoch_units(epoch + 1))  # earlier calls have no effect
        np.random.default_rng().random()
        assert list(one.epoch_units(epoch)) == list(other.epoch_units(epoch))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, SEEDS, st.integers(0, 5))
def test_no_pack_exceeds_the_max_length(lengths: list[int], seed: int, epoch: int) -> None:
    order = PackOrder(np.array(lengths, np.int32), max_length=MAX_LENGTH, seed=seed)
    packs = list(order.epoch_units(epoch))
    assert max(sum(lengths[row] for row in pack) for pack in packs) <= MAX_LENGTH
    assert len(packs) == order.num_packs
