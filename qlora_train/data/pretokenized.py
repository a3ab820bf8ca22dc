"""Rows that come as tokens: `input_ids`, and which of them are labels.

`labels` is as Transformers has it, not shifted: the token itself, or -100 where there is no loss. `loss_mask`,
`completion_mask` and `assistant_masks` hold 1 where there is loss. Where several are given a token needs all of them, as in
TRL. Without any, every token is a label. What would be lost is refused: padding, and packed documents.
"""

from collections.abc import Mapping
from typing import Any

from qlora_train.data.readers import kind_of
from qlora_train.data.types import Row, UnusableRowError
from qlora_train.utils.constants import IGNORE_INDEX

MASKS = ("loss_mask", "completion_mask", "assistant_masks")
LARGEST_ID = 2**31 - 1


def read_token_row(where: str, values: Mapping[str, Any]) -> Row:
    """Return a row of tokens.

    Raises:
        UnusableRowError: a column is no list of whole numbers of the right length and range, labels are not the tokens,
            or the row is padded or packed.
    """
    input_ids = _whole_numbers(values["input_ids"], "input_ids")
    if not input_ids:
        raise UnusableRowError("input_ids is an empty list")
    if min(input_ids) < 0 or max(input_ids) > LARGEST_ID:
        raise UnusableRowError("input_ids holds a number that no token can have")
    _check_one_document(values, len(input_ids))
    loss = [True] * len(input_ids)
    if values.get("labels") is not None:
        loss = _labelled(_column(values["labels"], "labels", len(input_ids)), input_ids)
    for name in MASKS:
        if values.get(name) is not None:
            mask = _binary(_column(values[name], name, len(input_ids)), name)
            loss = [both and bool(one) for both, one in zip(loss, mask, strict=True)]
    return Row(where, input_ids=tuple(input_ids), loss_mask=tuple(loss))


def _whole_numbers(value: Any, name: str, kinds: frozenset[type] = frozenset({int})) -> list[int]:
    if not isinstance(value, list):
        raise UnusableRowError(f"{name} is {kind_of(value)}, expected a list of whole numbers")
    other = set(map(type, value)) - kinds
    if other:
        found = "a number with a point" if float in other else kind_of(next(v for v in value if type(v) in other))
        raise UnusableRowError(f"{name} holds {found}, expected whole numbers")
    return value


def _column(value: Any, name: str, length: int) -> list[int]:
    kinds = frozenset({int, bool}) if name in MASKS else frozenset({int})
    numbers = _whole_numbers(value, name, kinds)
    if len(numbers) != length:
        raise UnusableRowError(f"{name} and input_ids differ in length")
    return numbers


def _binary(mask: list[int], name: str) -> list[int]:
    if not set(mask) <= {0, 1}:
        raise UnusableRowError(f"{name} holds another number than 0 and 1")
    return mask


def _labelled(labels: list[int], input_ids: list[int]) -> list[bool]:
    loss = [label != IGNORE_INDEX for label in labels]
    if labels != [token if has_loss else IGNORE_INDEX for token, has_loss in zip(input_ids, loss, strict=True)]:
        raise UnusableRowError(
            f"labels are not the tokens of input_ids; expected each its own token, not shifted, or {IGNORE_INDEX}"
        )
    return loss


def _check_one_document(values: Mapping[str, Any], length: int) -> None:
    if values.get("attention_mask") is not None:
        mask = _binary(_column(values["attention_mask"], "attention_mask", length), "attention_mask")
        if 0 in mask:
            raise UnusableRowError("attention_mask holds 0 (padding?); expected rows without padding")
    if values.get("position_ids") is not None:
        positions = _column(values["position_ids"], "position_ids", length)
        if positions != list(range(length)):
            raise UnusableRowError("position_ids do not count from 0 (several documents in a row?); expected one a row")
