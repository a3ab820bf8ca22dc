"""Strict JSON: what the standard decoder accepts but loses data of (duplicate keys, NaN) is refused."""

import json
from collections.abc import Callable
from typing import Any

from qlora_train.utils.errors import DataError

MAX_KEY_CHARACTERS = 80
"""Characters of a key in an error message."""
JSON_TYPES = {
    bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object",
    bytes: "bytes", type(None): "null",
}  # fmt: skip


class NotJSONError(ValueError):
    """Text that the standard decoder accepts although it is not JSON."""


def _refuse_constant(name: str) -> Any:
    raise NotJSONError(f"found {name}, which is not JSON; expected a number, a string or null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])[:MAX_KEY_CHARACTERS]
        raise NotJSONError(f"found the key {json.dumps(twice)} twice in one object; expected it once")
    return unique


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def json_error(
    error: ValueError | RecursionError, location: Callable[[int], str], where: str, expected: str
) -> DataError:
    """Return the error for a value at `where` that `DECODER` refuses; `location` turns a position into file:line:column."""
    if isinstance(error, json.JSONDecodeError):
        found = error.msg.removesuffix(" at").removesuffix(" starting")  # the location stands before it
        end = error.doc[error.pos : error.pos + 1]
        if end in ("}", "]") and error.doc[: error.pos].rstrip().endswith(","):
            found = f"a comma before {end}"  # which Python names from 3.13 on
        return DataError(f"{location(error.pos)}: broken JSON: {found}; {expected}")
    if isinstance(error, RecursionError):
        return DataError(f"{where}: found JSON that is nested too deeply; {expected}")
    if isinstance(error, NotJSONError):
        return DataError(f"{where}: {error}")
    return DataError(f"{where}: found a number with too many digits; expected it as a string")  # sys.int_info


def json_type(value: Any) -> str:
    """Name the type of a JSON value in JSON's words."""
    return JSON_TYPES.get(type(value), f"a {type(value).__name__}")
