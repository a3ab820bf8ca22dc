"""Packs hold every row once, as well as best-fit decreasing can, in an order that is a pure function of the seed."""

import time
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.data.packing import PackOrder, best_fit_decreasing

CAPACITY = 60
ROWS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120)


def array(lengths: list[int]) -> np.ndarray:
    return np.array(lengths, np.int32)


def log_normal(count: int, *, capacity: int, seed: int = 0) -> np.ndarray:
    """Lengths with a median of 220 tokens and a standard deviation of 0.8 in the logarithm, cut at a pack's tokens."""
    lengths = np.random.default_rng(seed).lognormal(np.log(220), 0.8, count)
    return np.clip(lengths, 1, capacity).astype(np.int32)


def rooms_row_by_row(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined: what is left in each pack."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fullest = min((room for room in rooms if room >= length), default=None)
        if fullest is not None:
            rooms.remove(fullest)
        rooms.append((capacity if fullest is None else fullest) - length)
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(lengths=ROWS)
def test_packs_are_those_of_best_fit_decreasing_row_by_row(lengths: list[int]) -> None:
    groups = best_fit_decreasing(array(lengths), CAPACITY)
    placed = [length for group in groups for length, each in group.content for _ in range(each * group.count)]
    assert sorted(placed) == sorted(lengths)
    rooms = [
        CAPACITY - sum(length * each for length, each in group.content) for group in groups for _ in range(group.count)
    ]
    assert sorted(rooms) == rooms_row_by_row(lengths, CAPACITY)


@settings(max_examples=100, deadline=None)
@given(lengths=ROWS, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_row_once_and_no_pack_is_too_long(lengths: list[int], seed: int, epoch: int) -> None:
    order = PackOrder(array(lengths), max_length=CAPACITY, seed=seed)
    rows, starts = order.packs(epoch)
    packs = [rows[begin:end].tolist() for begin, end in pairwise(starts)]
    assert sorted(chain(*packs)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in pack) <= CAPACITY for pack in packs)
    assert len(packs) == order.num_packs == len(rooms_row_by_row(lengths, CAPACITY))
    assert list(order.epoch_units(epoch)) == packs
    assert len(packs) == len(order)
    assert order.efficiency == pytest.approx(sum(lengths) / (len(packs) * CAPACITY))


@pytest.mark.parametrize("capacity", [1024, 2048, 8192])
@pytest.mark.parametrize("count", [5_000, 200_000])
def test_packs_of_log_normal_lengths_are_at_least_97_percent_full(capacity: int, count: int) -> None:
    lengths = log_normal(count, capacity=capacity)
    assert PackOrder(lengths, max_length=capacity, seed=0).efficiency >= 0.97


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    lengths = log_normal(3000, capacity=2048)

    def order(seed: int, epoch: int) -> list[list[int]]:
        packs = list(PackOrder(lengths, max_length=2048, seed=seed).epoch_units(epoch))
        return [[*chain(*packs[i : i + 2])] for i in range(0, len(packs), 2)]

    state = np.random.get_state()[1].tolist()
    assert order(1, 3) == order(1, 3)
    assert np.random.get_state()[1].tolist() == state
    orders = [order(1, 0), order(1, 1), order(2, 0)]
    assert len({len(batches) for batches in orders}) == 1, "every epoch has as many packs"
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert one != other
            assert not {frozenset(batch) for batch in one} & {frozenset(batch) for batch in other}


def test_every_epoch_puts_other_rows_together() -> None:
    order = PackOrder(log_normal(30_000, capacity=2048), max_length=2048, seed=1)

    def neighbours(epoch: int) -> set[tuple[int, int]]:
        return {(a, b) for pack in order.epoch_units(epoch) for a in pack for b in pack if a < b}

    first, second = neighbours(0), neighbours(1)
    assert len(first & second) < 0.2 * len(first)


def test_packs_come_in_no_order_of_their_content() -> None:
    lengths = log_normal(20_000, capacity=2048)
    rows, starts = PackOrder(lengths, max_length=2048, seed=1).packs(0)
    num_rows = np.diff(starts).astype(float)
    longest = np.maximum.reduceat(lengths[rows], starts[:-1]).astype(float)
    for content in (num_rows, longest):
        assert abs(np.corrcoef(content, np.arange(len(content)))[0, 1]) < 0.05


def test_a_million_rows_are_packed_in_seconds() -> None:
    lengths = log_normal(1_000_000, capacity=2048)
    started = time.perf_counter()
    order = PackOrder(lengths, max_length=2048, seed=1)
    order.packs(0)
    assert time.perf_counter() - started < 15


def test_a_row_longer_than_a_pack_is_a_defect_of_ours() -> None:
    with pytest.raises(AssertionError, match="at most as many tokens as a pack"):
        best_fit_decreasing(array([61]), CAPACITY)
