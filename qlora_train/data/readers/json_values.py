"""JSON values, strictly: what the standard decoder would accept and lose something of is refused."""

import json
from collections.abc import Callable
from typing import Any

from qlora_train.utils.errors import DataError

LONGEST_KEY = 80
"""Characters of a key that a message shows."""


class NotJSONError(ValueError):
    """JSON that the standard decoder accepts, and that is none."""


def _no_constant(name: str) -> Any:
    raise NotJSONError(f"found {name}, which is not JSON; expected a number, a string or null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise NotJSONError(f"found the key {json.dumps(twice[:LONGEST_KEY])} twice in one object; expected it once")
    return unique


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def explained(error: ValueError | RecursionError, place: Callable[[int], str], where: str, expected: str) -> DataError:
    """Return what to say of a text that `DECODER` does not read.

    Args:
        error: what it raised.
        place: position in the decoded text -> ``file:line:column``.
        where: ``file:line`` of the value.
        expected: what the file should hold.
    """
    if isinstance(error, json.JSONDecodeError):
        found = error.msg.removesuffix(" at").removesuffix(" starting")  # the place stands before it
        return DataError(f"{place(error.pos)}: broken JSON: {found}; {expected}")
    if isinstance(error, RecursionError):
        return DataError(f"{where}: found JSON that is nested too deeply; {expected}")
    if isinstance(error, NotJSONError):
        return DataError(f"{where}: {error}")
    return DataError(f"{where}: found a number with too many digits; expected it as a string")  # sys.int_info


def kind_of(value: Any) -> str:
    """Name the type of a JSON value in JSON's words."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
