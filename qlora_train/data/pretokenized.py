"""Rows that come as tokens: `input_ids`, and which of them are labels.

`labels` is as in Transformers, not shifted: the token itself, or -100. `loss_mask`, `completion_mask` and
`assistant_masks` hold 1 for a label. Where several are given, a token needs all of them, as in TRL. Without any, every
token is a label. Padding and packed documents are refused.
"""

from collections.abc import Mapping
from typing import Any

from qlora_train.data.formats import MASK_COLUMNS
from qlora_train.data.readers import json_type
from qlora_train.data.types import Row, UnusableRowError
from qlora_train.utils.constants import IGNORE_INDEX

MAX_TOKEN_ID = 2**31 - 1


def read_token_row(where: str, values: Mapping[str, Any]) -> Row:
    """Return a row of tokens.

    Raises:
        UnusableRowError: a column is no list of integers of the right length and range, labels differ from the tokens, or
            the row is padded or packed.
    """
    input_ids = _integers(values["input_ids"], "input_ids")
    if not input_ids:
        raise UnusableRowError("input_ids is an empty list")
    if min(input_ids) < 0 or max(input_ids) > MAX_TOKEN_ID:
        raise UnusableRowError("input_ids holds a number that no token can have")
    length = len(input_ids)
    if values.get("attention_mask") is not None and 0 in _mask(values["attention_mask"], "attention_mask", length):
        raise UnusableRowError("attention_mask holds 0 (padding?); expected rows without padding")
    positions = values.get("position_ids")
    if positions is not None and _integers(positions, "position_ids", length) != list(range(length)):
        raise UnusableRowError("position_ids do not count from 0 (several documents in a row?); expected one a row")
    is_label = [True] * length
    if values.get("labels") is not None:
        is_label = _is_label(_integers(values["labels"], "labels", length), input_ids)
    for name in MASK_COLUMNS:
        if values.get(name) is not None:
            is_label = [
                label and bool(one) for label, one in zip(is_label, _mask(values[name], name, length), strict=True)
            ]
    return Row(where, input_ids=tuple(input_ids), loss_mask=tuple(is_label))


def _integers(value: Any, name: str, length: int | None = None, *, or_bool: bool = False) -> list[int]:
    if not isinstance(value, list):
        raise UnusableRowError(f"{name} is {json_type(value)}, expected a list of whole numbers")
    other = set(map(type, value)) - ({int, bool} if or_bool else {int})
    if other:
        found = "a number with a point" if float in other else json_type(next(v for v in value if type(v) in other))
        raise UnusableRowError(f"{name} holds {found}, expected whole numbers")
    if length is not None and len(value) != length:
        raise UnusableRowError(f"{name} and input_ids differ in length")
    return value


def _mask(value: Any, name: str, length: int) -> list[int]:
    mask = _integers(value, name, length, or_bool=name in MASK_COLUMNS)
    if not set(mask) <= {0, 1}:
        raise UnusableRowError(f"{name} holds another number than 0 and 1")
    return mask


def _is_label(labels: list[int], input_ids: list[int]) -> list[bool]:
    is_label = [label != IGNORE_INDEX for label in labels]
    if any(label != token for label, token, trained in zip(labels, input_ids, is_label, strict=True) if trained):
        raise UnusableRowError(
            f"labels are not the tokens of input_ids; expected each its own token, not shifted, or {IGNORE_INDEX}"
        )
    return is_label
