"""Checked values of one row's columns and fields: strings that can be tokenised, and JSON.

Everything here raises `UnusableRowError` with a reason that does not quote the row.
"""

import json
import math
from typing import Any

from qlora_train.data.readers.json_values import DECODER, json_type
from qlora_train.data.types import UnusableRowError

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that count as a missing field: data sets with one schema for all turns fill them in."""


def read_string(value: Any, name: str) -> str:
    """Return a string without NUL or unpaired surrogates."""
    if not isinstance(value, str):
        raise UnusableRowError(f"{name} is {json_type(value)}, expected a string")
    if "\0" in value:
        raise UnusableRowError(f"{name} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UnusableRowError(f"{name} holds half a surrogate pair (a broken \\uD8xx escape)") from None
    return value


def read_optional_string(value: Any, name: str) -> str | None:
    """Return a string; None for null and blank ones."""
    if value is None:
        return None
    text = read_string(value, name)
    return text if text.strip() else None


def read_json(value: Any, name: str) -> Any:
    """Return a strict JSON value, which may come as a string with JSON in it.

    Null fields are left out of a value that is no string: Parquet and Arrow give every object the fields of all, so the
    arguments of one function would appear, null, in the calls of another. A string preserves a null that is meant.
    """
    is_text = isinstance(value, str)
    try:
        return _checked(_parsed(value, name) if is_text else value, name, keep_null=is_text)
    except RecursionError:
        raise UnusableRowError(f"{name} is nested too deeply") from None


def _parsed(text: str, name: str) -> Any:
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UnusableRowError(f"{name} is a string with broken JSON: {error.msg}") from None
    except ValueError:
        raise UnusableRowError(
            f"{name} is a string with broken JSON: a field twice, NaN or Infinity, or a number with too many digits"
        ) from None


def _checked(value: Any, name: str, *, keep_null: bool) -> Any:
    kind = type(value)
    if kind is str:
        return read_string(value, name)
    if kind is dict:
        return {
            read_string(field, name): _checked(item, name, keep_null=keep_null)
            for field, item in value.items()
            if keep_null or item is not None
        }
    if kind is list:
        return [_checked(item, name, keep_null=keep_null) for item in value]
    if value is None or kind is bool or kind is int or (kind is float and math.isfinite(value)):
        return value
    found = "a number that is not finite" if kind is float else json_type(value)
    raise UnusableRowError(f"{name} holds {found}, which JSON cannot say")
