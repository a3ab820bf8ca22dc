"""Examples become padded batches, in an order that is a pure function of the seed."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.data.batch_order import MEGABATCH_BATCHES, RowOrder, epoch_order
from qlora_train.data.collate import (
    FlatteningCollator,
    PaddingCollator,
    RowDataset,
    StepCollator,
    TokenBudget,
    batches_with_labels,
    padding_multiple,
)
from qlora_train.data.types import Example
from qlora_train.utils.constants import IGNORE_INDEX
from tests.support.stores import example, rows_of

EXAMPLES = [example((5, 6, 7), (0, 1, 1)), example(range(1, 10), (0,) * 8 + (1,))]
NUMBERED = list(enumerate(EXAMPLES))


def array(lengths: list[int]) -> np.ndarray:
    return np.array(lengths, np.int32)


def test_the_data_set_reads_rows_of_a_store_with_their_numbers(tmp_path: Path) -> None:
    dataset = RowDataset(rows_of(tmp_path / "store", EXAMPLES))
    [(number, row)] = dataset[[1]]
    assert (len(dataset), number, row.where) == (2, 1, "file.jsonl:2")
    assert row.input_ids.tolist() == list(range(1, 10))
    assert row.loss_mask.tolist() == [False] * 8 + [True]


def test_the_collator_pads_right_and_never_labels_padding() -> None:
    batch = PaddingCollator(pad_token_id=7, pad_to_multiple_of=8)(NUMBERED)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 16), "attention_mask": (2, 16), "labels": (2, 16), "row": (2,),
    }  # fmt: skip
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [7] * 13
    assert batch["labels"][0].tolist() == [IGNORE_INDEX, 6, 7] + [IGNORE_INDEX] * 13
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["row"].tolist() == [0, 1]


def test_rows_are_padded_to_lengths_that_come_again() -> None:
    lengths = {
        device: PaddingCollator(0, padding_multiple(torch.device(device)))(NUMBERED)["input_ids"].shape[1]
        for device in ("cpu", "cuda")
    }
    assert lengths == {"cpu": 12, "cuda": 16}


def of_sizes(*sizes: tuple[int, int]) -> list[tuple[int, Example]]:
    """Return numbered rows of so many tokens, so many of them labels."""
    rows = [example(range(1, tokens + 1), (0,) * (tokens - labels) + (1,) * labels) for tokens, labels in sizes]
    return list(enumerate(rows))


def test_a_step_has_the_micro_batches_that_it_is_given() -> None:
    rows = of_sizes((3, 1), (5, 2), (4, 1))
    batches = StepCollator(PaddingCollator(0))([rows[:2], rows[2:]])
    assert [batch["row"].tolist() for batch in batches] == [[0, 1], [2]]
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5), (1, 4)]


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (TokenBudget(9, 9), [[1, 2], [3, 4, 0]]),
        (TokenBudget(9, 3), [[1, 2], [3, 4], [0]]),  # labels of 3 and 4: all that fit
        (TokenBudget(19, 9), [[1, 2, 3, 4, 0]]),
    ],
)
def test_micro_batches_are_filled_up_to_the_most_that_they_hold(most: TokenBudget, wanted: list[list[int]]) -> None:
    rows = of_sizes((2, 1), (5, 2), (4, 1), (3, 2), (3, 1))
    micro_batches = [[row] for row in rows]
    groups = StepCollator(FlatteningCollator(), most).grouped(micro_batches)
    assert [[number for number, _ in group] for group in groups] == wanted
    for batch in StepCollator(FlatteningCollator(), most)(micro_batches):
        assert batch["input_ids"].numel() <= most.max_tokens
        assert int((batch["labels"] != IGNORE_INDEX).sum()) <= most.max_labels


def test_a_step_that_cannot_be_put_together_in_fewer_micro_batches_stays_as_it_is() -> None:
    rows = of_sizes((5, 1), (6, 1), (4, 1), (5, 1))
    micro_batches = [rows[:2], rows[2:]]
    assert StepCollator(FlatteningCollator(), TokenBudget(12, 9)).grouped(micro_batches) is micro_batches


def test_packed_rows_lie_end_to_end_with_positions_and_labels_of_their_own() -> None:
    batch = FlatteningCollator()([(4, EXAMPLES[0]), (2, EXAMPLES[1])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 8 + [9] + [IGNORE_INDEX, 6, 7]]
    assert batch["row"].tolist() == [2, 4], "the longest first"
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert "attention_mask" not in batch, "with a mask Transformers would not look for documents"


def test_a_label_that_the_document_before_would_predict_is_refused() -> None:
    with pytest.raises(AssertionError, match="nothing predicts the first token"):
        FlatteningCollator()([(0, EXAMPLES[0]), (1, example((5, 6), (1, 1)))])


def order_in_plain_python(lengths: list[int], *, seed: int, epoch: int, batch_size: int, group: bool) -> list[int]:
    """The order that runs have had from the beginning, one step after the other."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    shuffled: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    if not group:
        return shuffled
    batches: list[list[int]] = []
    for begin in range(0, len(shuffled), batch_size * MEGABATCH_BATCHES):
        megabatch = shuffled[begin : begin + batch_size * MEGABATCH_BATCHES]
        megabatch.sort(key=lambda row: lengths[row], reverse=True)
        batches += [megabatch[i : i + batch_size] for i in range(0, len(megabatch), batch_size)]
    num_full = len(lengths) // batch_size
    order = torch.randperm(num_full, generator=generator).tolist()
    return [row for i in [*order, *range(num_full, len(batches))] for row in batches[i]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=400),
    batch_size=st.integers(1, 4),
    group=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_epoch_visits_every_row_once_in_the_order_of_every_release(
    lengths: list[int], batch_size: int, group: bool, seed: int
) -> None:
    order = epoch_order(array(lengths), seed=seed, epoch=1, batch_size=batch_size, group_by_length=group)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    wanted = order_in_plain_python(lengths, seed=seed, epoch=1, batch_size=batch_size, group=group)
    assert order.tolist() == wanted


def test_the_order_depends_on_seed_and_epoch_and_leaves_the_global_generator_alone() -> None:
    lengths = array([i % 37 + 1 for i in range(1000)])

    def order(seed: int, epoch: int, group: bool) -> list[int]:
        return epoch_order(lengths, seed=seed, epoch=epoch, batch_size=4, group_by_length=group).tolist()

    state = torch.get_rng_state()
    for group in (False, True):
        orders = [order(seed, epoch, group) for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0))]
        assert orders[0] == orders[3]
        assert orders[0] != orders[1] != orders[2] != orders[0]
        torch.rand(3)
        assert order(1, 0, group) == orders[0]
    torch.set_rng_state(state)
    order(1, 0, group=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_units_of_an_epoch_are_its_rows_in_order() -> None:
    lengths = array([3, 1, 4, 1, 5, 9, 2])
    units = list(RowOrder(lengths, seed=3, group_by_length=False, group_batch_size=3).epoch_units(2))
    flat = epoch_order(lengths, seed=3, epoch=2, batch_size=3, group_by_length=False)
    assert [[row] for row in flat.tolist()] == units


def test_grouping_by_length_pads_little_and_keeps_batches_in_random_order() -> None:
    lengths = torch.randint(1, 1000, (1003,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(order: list[int]) -> int:
        batches = [[lengths[row] for row in order[i : i + 4]] for i in range(0, len(order), 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    plain, grouped = (
        epoch_order(array(lengths), seed=5, epoch=0, batch_size=4, group_by_length=group).tolist()
        for group in (False, True)
    )
    assert padding(grouped) < padding(plain) / 10
    longest = [max(lengths[row] for row in grouped[i : i + 4]) for i in range(0, 1000, 4)]
    assert longest[:MEGABATCH_BATCHES] != sorted(longest[:MEGABATCH_BATCHES], reverse=True)


def test_batches_with_enough_labels_take_the_rows_they_need() -> None:
    generator = random.Random(0)
    rows = [example(range(1, 8), [0, *(generator.randint(0, 1) for _ in range(6))]) for _ in range(40)]
    order = np.arange(39, -1, -1)
    batches = batches_with_labels(rows, order, PaddingCollator(0), min_labels=10, max_batches=3)
    assert len(batches) == 3
    seen = [row for batch in batches for row in batch["row"].tolist()]
    assert seen == order[: len(seen)].tolist()
    for batch in batches:
        num_labels = (batch["labels"] != IGNORE_INDEX).sum(1)
        assert num_labels.sum() >= 10
        assert num_labels[:-1].sum() < 10, "no row more than it takes"
    too_few = batches_with_labels(rows[:1], np.arange(1), PaddingCollator(0), min_labels=100, max_batches=3)
    assert [batch["row"].tolist() for batch in too_few] == [[0]]
