"""Rows that come as tokens: which of them are labels, and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.data.types import Row
from tests.support.rows import read, reason_of


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), *[st.booleans()] * 4), min_size=1, max_size=40), st.data())
def test_a_token_is_a_label_where_every_given_column_says_so(
    tokens: list[tuple[int, bool, bool, bool, bool]], data: st.DataObject
) -> None:
    given_names = data.draw(st.sets(st.sampled_from(["labels", "loss_mask", "completion_mask", "assistant_masks"])))
    values: dict[str, Any] = {"input_ids": [token for token, *_ in tokens]}
    expected = []
    for token, *flags in tokens:
        named = dict(zip(("labels", "loss_mask", "completion_mask", "assistant_masks"), flags, strict=True))
        for name in given_names:
            value = (token if named[name] else -100) if name == "labels" else int(named[name])
            values.setdefault(name, []).append(value)
        expected.append(all(named[name] for name in given_names))
    row = read(values | {"attention_mask": [1] * len(tokens), "position_ids": list(range(len(tokens)))})
    assert (row.input_ids, row.loss_mask) == (tuple(values["input_ids"]), tuple(expected))


def test_masks_may_be_boolean_and_null_columns_are_ignored() -> None:
    row = read({"input_ids": [5, 6, 7], "loss_mask": [False, True, True], "labels": None, "attention_mask": None})
    assert row == Row("a.jsonl:1", input_ids=(5, 6, 7), loss_mask=(False, True, True))


NOT_TOKENS = "labels are not the tokens of input_ids; expected each its own token, not shifted, or -100"
TOKENS: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": "1 2"}, "input_ids is a string, expected a list of whole numbers"),
    ({"input_ids": None}, "input_ids is null, expected a list of whole numbers"),
    ({"input_ids": []}, "input_ids is an empty list"),
    ({"input_ids": [1, True]}, "input_ids holds true or false, expected whole numbers"),
    ({"input_ids": [1, 2.0]}, "input_ids holds a number with a point, expected whole numbers"),
    ({"input_ids": [1, None]}, "input_ids holds null, expected whole numbers"),
    ({"input_ids": [[1]]}, "input_ids holds a list, expected whole numbers"),
    ({"input_ids": [1, -1]}, "input_ids holds a number that no token can have"),
    ({"input_ids": [1, 2**31]}, "input_ids holds a number that no token can have"),
    ({"input_ids": [1, 2], "labels": [1]}, "labels and input_ids differ in length"),
    ({"input_ids": [1, 2], "labels": [True, 2]}, "labels holds true or false, expected whole numbers"),
    ({"input_ids": [1, 2], "labels": [2, -100]}, NOT_TOKENS),
    ({"input_ids": [1, 2], "labels": [-1, 2]}, NOT_TOKENS),
    ({"input_ids": [1, 2], "labels": 3}, "labels is a number, expected a list of whole numbers"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask holds another number than 0 and 1"),
    ({"input_ids": [1, 2], "loss_mask": [1]}, "loss_mask and input_ids differ in length"),
    (
        {"input_ids": [1, 2], "completion_mask": [0, 0.5]},
        "completion_mask holds a number with a point, expected whole numbers",
    ),
    ({"input_ids": [1, 2], "assistant_masks": [0, "1"]}, "assistant_masks holds a string, expected whole numbers"),
    (
        {"input_ids": [1, 2], "attention_mask": [1, 0]},
        "attention_mask holds 0 (padding?); expected rows without padding",
    ),
    ({"input_ids": [1, 2], "attention_mask": [1, 7]}, "attention_mask holds another number than 0 and 1"),
    (
        {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]},
        "position_ids do not count from 0 (several documents in a row?); expected one a row",
    ),
]


@pytest.mark.parametrize(("values", "reason"), TOKENS, ids=[reason[:60] for _, reason in TOKENS])
def test_tokens_that_cannot_be_used_give_their_reason(values: dict[str, Any], reason: str) -> None:
    assert reason_of(values) == reason
