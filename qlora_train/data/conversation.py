"""Turns of a row -> messages in OpenAI's shape, with checked fields and an order of roles that chat templates accept.

A turn has `role`, `content` and the fields of `FIELDS`; ShareGPT's {from, value} is converted. A non-empty field beyond
these refuses the row, because training would lose it. `developer` is read as `system`, the older `function` as `tool` and
`function_call` as one call of `tool_calls`; content may be a list of text parts. `train` and `weight` decide whether an
assistant turn is trained; other turns never are, and a row that asks for it is refused.

Everything here raises `UnusableRowError` with a reason that does not quote the row.
"""

from collections.abc import Sequence
from typing import Any

from qlora_train.data.field_values import EMPTY, read_string
from qlora_train.data.readers import json_type
from qlora_train.data.tool_calls import read_calls
from qlora_train.data.types import Message, UnusableRowError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
ROLE_NAMES = "system, user, assistant, tool"
SHAREGPT_CALL = "function_call"
"""ShareGPT's sender of a turn whose value is the JSON of a call, or of a list of calls."""
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    SHAREGPT_CALL: "assistant",
    "observation": "tool",
    "tool": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
TRAINED_FLAGS = ("train", "weight")
FIELDS: dict[str, tuple[str, ...]] = {
    "system": TRAINED_FLAGS,
    "user": TRAINED_FLAGS,
    "assistant": (*REASONING, *CALLS, *TRAINED_FLAGS),
    "tool": ("tool_call_id", "name", *TRAINED_FLAGS),
}
"""Fields that a turn may have beside role and content."""
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Roles that may follow a role, None at the start: the order that most chat templates insist on. Several of them refuse two
user turns in a row, or an assistant first; others silently merge or reorder them."""


def read_turns(value: Any, column: str, *, sharegpt: bool = False) -> tuple[list[Message], list[int]]:
    """Return a list of turns as messages, and the indices of those that the row excludes from training.

    Args:
        value: of the column.
        column: its name, for reasons.
        sharegpt: turns may be {from, value}.
    """
    shape = "from, value" if column == "conversations" else "role, content"
    if not isinstance(value, list):
        raise UnusableRowError(f"{column} is {json_type(value)}, expected a list of {{{shape}}}")
    if not value:
        raise UnusableRowError(f"{column} is an empty list")
    messages: list[Message] = []
    untrained: list[int] = []
    for index, original in enumerate(value):
        turn = _from_sharegpt(original) if sharegpt else original
        _check_fields(turn, column, shape)
        if len(turn) == 2 and "content" in turn:  # most turns
            role = _read_role(turn["role"])
            messages.append({"role": role, "content": _read_content(turn["content"], role)})
            continue
        message, is_trained = _read_turn(turn)
        messages.append(message)
        if not is_trained:
            untrained.append(index)
    return messages, untrained


def _from_sharegpt(turn: Any) -> Any:
    """Return a turn of ShareGPT as {role, content} with all its other fields; anything else unchanged."""
    if not isinstance(turn, dict) or turn.get("from") in EMPTY or "value" not in turn:
        return turn
    sender, value = turn["from"], turn["value"]
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        found = f'"{sender}"' if isinstance(sender, str) else "no string"
        raise UnusableRowError(f"a turn is from {found}, expected {', '.join(SHAREGPT_ROLES)}")
    others = {name: field for name, field in turn.items() if name not in ("from", "value") and field not in EMPTY}
    converted = {"role": role, "content": value}
    if sender == SHAREGPT_CALL:
        converted = {"role": role, "content": "", "tool_calls": read_calls(value, SHAREGPT_CALL)}
    twice = next((name for name in others if name in converted), None)
    if twice is not None:
        raise UnusableRowError(f"a turn has both from and {twice}, expected from, value")
    return converted | others


def _check_fields(turn: Any, column: str, shape: str) -> None:
    if not isinstance(turn, dict):
        raise UnusableRowError(f"{column} holds {json_type(turn)}, expected {{{shape}}}")
    if "role" not in turn or ("content" not in turn and all(turn.get(name) in EMPTY for name in CALLS)):
        found = ", ".join(turn) or "none"
        is_sharegpt = column == "messages" and "from" in turn
        hint = "; data.columns: {conversations: messages} reads from, value" if is_sharegpt else ""
        names = shape.split(", ")
        lacking = ", ".join([name for name in names if name not in turn] or names)
        raise UnusableRowError(f"a turn in {column} lacks {lacking}: found {found}, expected {shape}{hint}")


def _read_role(role: Any) -> str:
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        found = f'"{role}"' if isinstance(role, str) else json_type(role)
        raise UnusableRowError(f"a turn has the role {found}, expected {ROLE_NAMES}")
    return known


def _read_content(content: Any, role: str) -> str:
    name = f"the content of a turn with role {role}"
    if not isinstance(content, list):
        return read_string(content, name)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else None
            found = f"of type {kind}" if isinstance(kind, str) else f"that is {json_type(part)}"
            raise UnusableRowError(f"{name} has a part {found}, expected {{type: text, text: ...}}")
        texts.append(read_string(part.get("text"), name))
    return "".join(texts)


def _read_turn(turn: dict[str, Any]) -> tuple[Message, bool]:
    """Return a turn with more fields than role and content, and whether an assistant turn is trained."""
    role = _read_role(turn["role"])
    fields = {name: field for name, field in turn.items() if name not in ("role", "content") and field not in EMPTY}
    lost = next((name for name in fields if name not in FIELDS[role]), None)
    if lost is not None:
        raise UnusableRowError(f"a turn with role {role} has the field {lost}, which training would lose; remove it")
    calls = _read_calls(fields)
    content = "" if calls and turn.get("content") is None else _read_content(turn.get("content"), role)
    message: Message = {"role": role, "content": "" if calls and not content.strip() else content}
    if calls:
        message["tool_calls"] = calls
    reasoning = {read_string(fields[name], name) for name in REASONING if name in fields}
    if len(reasoning) > 1:
        raise UnusableRowError(f"a turn has two different texts of reasoning, expected one of {', '.join(REASONING)}")
    if reasoning:
        message["reasoning_content"] = reasoning.pop()
    if "tool_call_id" in fields:
        message["tool_call_id"] = read_string(fields["tool_call_id"], "tool_call_id")
    if "name" in fields:
        message["name"] = read_string(fields["name"], "the name of a turn with role tool")
    return message, _is_trained(fields, role)


def _read_calls(fields: dict[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in CALLS if name in fields]
    if len(names) > 1:
        raise UnusableRowError(f"a turn has both {' and '.join(CALLS)}, expected tool_calls")
    return read_calls(fields[names[0]], names[0]) if names else []


def _is_trained(fields: dict[str, Any], role: str) -> bool:
    flags = {_read_flag(fields[name], name) for name in TRAINED_FLAGS if name in fields}
    if len(flags) > 1:
        raise UnusableRowError("a turn has train and weight that contradict each other")
    if role != "assistant" and True in flags:
        raise UnusableRowError(f"a turn with role {role} asks to be trained; only assistant turns can be")
    return role != "assistant" or False not in flags


def _read_flag(value: Any, name: str) -> bool:
    if name == "train" and isinstance(value, bool):
        return value
    if name == "weight" and type(value) in (int, float) and value in (0, 1):
        return bool(value)
    expected = "true or false" if name == "train" else "0 or 1"
    found = "another number" if name == "weight" and type(value) in (int, float) else json_type(value)
    raise UnusableRowError(f"{name} of a turn is {found}, expected {expected}")


def check_turns(turns: Sequence[Message]) -> None:
    """Check that the roles alternate, that the conversation ends with an answer, and that no answer is empty.

    Tool turns follow an assistant turn with calls, then the assistant continues. A tool turn with a `tool_call_id` answers
    a call of the assistant turn before, once.
    """
    if all(turn["role"] != "assistant" for turn in turns):
        raise UnusableRowError("no assistant turn to learn from")
    before: str | None = None
    called = False
    open_ids: list[str] = []
    for turn in turns:
        role = turn["role"]
        if role not in FOLLOWS[before]:
            position = "at the start" if before is None else f"after {before}"
            raise UnusableRowError(f"{role} turn {position}, expected {' or '.join(FOLLOWS[before])}")
        if role == "tool":
            _close_call(turn, open_ids)
        elif called and before == "assistant":
            raise UnusableRowError(f"{role} turn after an assistant turn with tool_calls, expected tool")
        elif role == "assistant":
            called = "tool_calls" in turn
            open_ids = [call["id"] for call in turn.get("tool_calls", []) if "id" in call]
            if not called and not turn["content"].strip():
                raise UnusableRowError("empty assistant turn")
        before = role
    if before != "assistant":
        raise UnusableRowError(f"the conversation ends with a {before} turn, expected an assistant turn")


def _close_call(result: Message, open_ids: list[str]) -> None:
    call_id = result.get("tool_call_id")
    if call_id is None:
        return
    if call_id not in open_ids:
        raise UnusableRowError("a tool turn has a tool_call_id that no open call of the assistant turn before has")
    open_ids.remove(call_id)
