"""What a column or a field of a row may hold: nothing, text that can be tokenised, JSON.

Everything here concerns one row and raises `UnusableRowError` with a reason that does not quote the row.
"""

import json
import math
from typing import Any

from qlora_train.data.readers.json_values import DECODER, kind_of
from qlora_train.data.types import UnusableRowError

NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that say nothing, as data sets with one schema for all turns fill in."""


def read_string(value: Any, name: str) -> str:
    """Return `value` if it is a string that can be tokenised.

    Raises:
        UnusableRowError: it is null, of another type, or holds a NUL or half a surrogate pair.
    """
    if not isinstance(value, str):
        raise UnusableRowError(f"{name} is {kind_of(value)}, expected a string")
    if "\0" in value:
        raise UnusableRowError(f"{name} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UnusableRowError(f"{name} holds half a surrogate pair (a broken \\uD8xx escape)") from None
    return value


def read_said(value: Any, name: str) -> str | None:
    """Return an optional string; None where it is null or blank."""
    if value is None:
        return None
    text = read_string(value, name)
    return text if text.strip() else None


def read_json(value: Any, name: str) -> Any:
    """Return a JSON value that may come as a string with JSON in it.

    In a value that is no string, fields that are null are left out, since Parquet and Arrow give every object the
    fields of all: the arguments of one function would turn up, null, in the calls of another. Where null is meant, as
    an argument or in an enum, the string keeps it.

    Raises:
        UnusableRowError: the string is not strict JSON, or the value holds what JSON cannot say.
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
    found = "a number that is not finite" if kind is float else kind_of(value)
    raise UnusableRowError(f"{name} holds {found}, which JSON cannot say")
