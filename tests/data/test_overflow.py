"""Rows longer than `data.max_length`, checked token by token."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qlora_train.data.overflow import apply_overflow
from qlora_train.data.types import Example, UnusableRowError
from qlora_train.utils.errors import DataError

BOS = 7
CUTTING = ("truncate", "keep_end", "keep_answer", "split")


def example(mask: str, *, bos: bool = False) -> Example:
    """Return a row whose tokens are their positions, from 100 on, and whose labels are the x in `mask`."""
    ids = np.arange(100, 100 + len(mask), dtype=np.int32)
    if bos:
        ids[0] = BOS
    return Example("rows.jsonl:3", ids, np.array([c == "x" for c in mask]), "question", "answer", ("before",))


def shown(part: Example) -> str:
    """Return the positions of a part's tokens, labels in brackets; ^ is the beginning token."""
    names = ["^" if token == BOS else str(token - 100) for token in part.input_ids.tolist()]
    return " ".join(f"[{name}]" if label else name for name, label in zip(names, part.loss_mask, strict=True))


def cut(mask: str, overflow: Any, max_length: int, *, bos: bool = False) -> list[str]:
    return [
        shown(part)
        for part in apply_overflow(example(mask, bos=bos), max_length=max_length, overflow=overflow, bos=BOS)
    ]


@pytest.mark.parametrize("overflow", ["drop", "refuse", *CUTTING])
def test_a_row_that_fits_stays_as_it_is(overflow: Any) -> None:
    row = example("..xx")
    assert apply_overflow(row, max_length=4, overflow=overflow, bos=None) == [row]


def test_a_long_row_is_dropped_with_the_limit() -> None:
    with pytest.raises(UnusableRowError, match=r"^longer than data.max_length \(3 tokens\)$"):
        cut("..xx", "drop", 3)


def test_a_long_row_is_refused_with_its_place_length_and_the_way_out() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:3: found a row of 4 tokens; data.max_length allows 3; .*overflow"):
        cut("..xx", "refuse", 3)


def test_each_cut_keeps_its_tokens() -> None:
    assert cut("..xx..xx", "truncate", 5) == ["0 1 [2] [3] 4"]
    assert cut("..xx..xx", "keep_end", 5) == ["3 4 5 [6] [7]"]
    assert cut("..xx..xx", "keep_answer", 5) == ["3 4 5 [6] [7]"]
    assert cut("..xx..xx", "keep_answer", 5, bos=True) == ["^ 4 5 [6] [7]"]
    assert cut("..xx..xx..", "keep_answer", 6, bos=True) == ["^ [3] 4 5 [6] [7]"]
    assert cut("..xx..xx.", "split", 3) == ["0 1 [2]", "2 [3] 4", "4 5 [6]", "6 [7] 8"]
    assert cut("...xxx...", "split", 3) == ["2 [3] [4]", "4 [5] 6"]


def test_warnings_name_the_cut_once_per_row() -> None:
    def warnings(mask: str, overflow: Any, max_length: int) -> list[tuple[str, ...]]:
        return [
            part.warnings for part in apply_overflow(example(mask), max_length=max_length, overflow=overflow, bos=None)
        ]

    assert warnings("..xx..", "truncate", 4) == [("before", "cut at the end to data.max_length")]
    assert warnings("..xx..", "truncate", 3) == [("before", "cut at the end to data.max_length", "the answer is cut")]
    assert warnings("....xx", "keep_end", 4) == [("before", "cut at the beginning to data.max_length")]
    assert warnings("..xxxx", "keep_end", 3)[0][-1] == "the answer is cut"
    assert warnings(".x..xx", "keep_answer", 3)[0][1:] == (
        "cut before the last answer to data.max_length", "earlier answers are cut",
    )  # fmt: skip
    assert warnings(".x.x", "split", 2) == [("before", "split into pieces of data.max_length"), ()]


def test_only_the_first_part_of_a_row_has_its_prompt() -> None:
    parts = apply_overflow(example(".x.x"), max_length=2, overflow="split", bos=None)
    assert [(part.prompt, part.answer) for part in parts] == [("question", "answer"), (None, None)]


@pytest.mark.parametrize(
    ("mask", "overflow"),
    [
        ("....xx", "truncate"),
        ("xxx...", "keep_end"),
        ("...x..", "keep_end"),
        ("x.....", "split"),
        ("..xxx.", "keep_answer"),
    ],
)
def test_a_row_without_a_label_after_the_cut_is_unusable(mask: str, overflow: Any) -> None:
    with pytest.raises(UnusableRowError, match=r"data.max_length \(3 tokens\)$"):
        cut(mask, overflow, 3)


def test_an_answer_that_does_not_fit_with_a_token_before_it_is_unusable() -> None:
    assert cut("....xxxx", "keep_answer", 5, bos=True) == ["^ [4] [5] [6] [7]"]
    with pytest.raises(UnusableRowError, match=r"the last answer alone is longer than data.max_length \(4 tokens\)"):
        cut("....xxxx", "keep_answer", 4)


@given(
    labels=st.lists(st.booleans(), min_size=2, max_size=40),
    max_length=st.integers(2, 20),
    overflow=st.sampled_from(CUTTING),
    bos=st.booleans(),
)
def test_every_part_is_short_has_a_label_and_keeps_the_rows_labels(
    labels: list[bool], max_length: int, overflow: Any, bos: bool
) -> None:
    row = example("".join(".x"[label] for label in [False, *labels[1:]]), bos=bos)
    assume(row.loss_mask.any())
    try:
        parts = apply_overflow(row, max_length=max_length, overflow=overflow, bos=BOS)
    except UnusableRowError:
        return
    is_label = dict(zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True))
    for part in parts:
        assert len(part.input_ids) == len(part.loss_mask) <= max(max_length, 1)
        assert part.loss_mask.any()
        assert not part.loss_mask[0]
        tokens = part.input_ids.tolist()
        assert part.loss_mask.tolist()[1:] == [is_label[token] for token in tokens[1:]]
        assert tokens[1:] == sorted(tokens[1:])
    if overflow == "split":
        trained = [token for part in parts for token in part.input_ids[part.loss_mask].tolist()]
        assert trained == [token for token, label in is_label.items() if label], "every label once"
    if overflow == "keep_answer":
        last = [token for token, label in is_label.items() if label][-1]
        assert parts[0].loss_mask[parts[0].input_ids.tolist().index(last)]
        assert (parts[0].input_ids[0] == BOS) == bos
