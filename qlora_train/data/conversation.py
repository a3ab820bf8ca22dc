"""What a conversation must be to be trained on: strings, known roles, an order that chat templates accept.

Everything here concerns one row and raises `UnusableRowError` with a reason that does not quote the row.
"""

from collections.abc import Sequence
from typing import Any

from qlora_train.data.readers import kind_of
from qlora_train.data.types import Message, UnusableRowError

ROLES = ("system", "user", "assistant", "tool")
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that say nothing, as data sets with one schema for all turns fill in."""
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Roles that may follow a role, None at the start: the order that most chat templates insist on. Two user turns in a
row, or an assistant first, are refused by several of them and silently merged or reordered by others."""


def read_string(value: Any, column: str) -> str:
    """Return `value` if it is a string that can be tokenised.

    Raises:
        UnusableRowError: it is null, of another type, or holds a NUL or half a surrogate pair.
    """
    if not isinstance(value, str):
        raise UnusableRowError(f"{column} is {kind_of(value)}, expected a string")
    if "\0" in value:
        raise UnusableRowError(f"{column} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableRowError(f"{column} holds half a surrogate pair (a broken \\uD8xx escape)") from None
    return value


def read_turns(value: Any, column: str) -> list[Message]:
    """Return a list of {role, content} objects as messages with string contents.

    Raises:
        UnusableRowError: a turn is something else, or has fields that would be lost.
    """
    if not isinstance(value, list):
        raise UnusableRowError(f"{column} is {kind_of(value)}, expected a list of {{role, content}}")
    if not value:
        raise UnusableRowError(f"{column} is an empty list")
    return [_read_turn(turn, column) for turn in value]


def _read_turn(turn: Any, column: str) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRowError(f"{column} holds {kind_of(turn)}, expected {{role, content}}")
    if "role" not in turn or "content" not in turn:
        raise UnusableRowError(f"a turn in {column} has the fields {', '.join(turn) or 'none'}, expected role, content")
    extra = [name for name, field in turn.items() if name not in ("role", "content") and field not in NOTHING]
    if extra:
        raise UnusableRowError(f"a turn has the field {extra[0]}, which training would lose; expected role, content")
    role = turn["role"]
    if role not in ROLES:
        found = f'"{role}"' if isinstance(role, str) else kind_of(role)
        raise UnusableRowError(f"a turn has the role {found}, expected {', '.join(ROLES)}")
    return {"role": role, "content": _read_content(turn["content"], role)}


def _read_content(content: Any, role: str) -> str:
    name = f"the content of a turn with role {role}"
    if not isinstance(content, list):
        return read_string(content, name)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            found = f"of type {part.get('type')}" if isinstance(part, dict) else kind_of(part)
            raise UnusableRowError(f"{name} has a part {found}, expected {{type: text, text: ...}}")
        texts.append(read_string(part.get("text"), name))
    return "".join(texts)


def check_turns(turns: Sequence[Message]) -> None:
    """Check that the roles alternate, that the conversation ends with an answer, and that no answer is empty.

    Raises:
        UnusableRowError: with the first thing that is wrong.
    """
    if all(turn["role"] != "assistant" for turn in turns):
        raise UnusableRowError("no assistant turn to learn from")
    before: str | None = None
    for turn in turns:
        role = turn["role"]
        if role not in FOLLOWS[before]:
            place = "at the start" if before is None else f"after {before}"
            raise UnusableRowError(f"{role} turn {place}, expected {' or '.join(FOLLOWS[before])}")
        if role == "assistant" and not turn["content"].strip():
            raise UnusableRowError("empty assistant turn")
        before = role
    if before != "assistant":
        raise UnusableRowError(f"the conversation ends with a {before} turn, expected an assistant turn")
