"""What a conversation must be to be trained on: strings, known roles, an order that chat templates accept.

Turns have OpenAI's shape: `role`, `content`, and what else `FIELDS` names. A field beyond these refuses the row, because
training would lose it; one that is empty says nothing. `developer` is read as `system`, the older `function` as `tool` and
`function_call` as one call of `tool_calls`; content may be a list of text parts. `train` and `weight` say whether an
assistant turn is learnt. Other turns never are: there they may say so, and a row that asks for more is refused.

Everything here concerns one row and raises `UnusableRowError` with a reason that does not quote the row.
"""

from collections.abc import Callable, Sequence
from typing import Any

from qlora_train.data.field_values import NOTHING, read_string
from qlora_train.data.readers import kind_of
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
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
RESULT = ("tool_call_id", "name")
LEARNT = ("train", "weight")
FIELDS: dict[str, tuple[str, ...]] = {
    "system": LEARNT,
    "user": LEARNT,
    "assistant": (*REASONING, *CALLS, *LEARNT),
    "tool": (*RESULT, *LEARNT),
}
"""Fields that a turn may have beside role and content."""
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Roles that may follow a role, None at the start: the order that most chat templates insist on. Two user turns in a
row, or an assistant first, are refused by several of them and silently merged or reordered by others."""


def read_turns(
    value: Any, column: str, *, shape: str = "role, content", as_openai: Callable[[Any], Any] | None = None
) -> tuple[list[Message], list[int]]:
    """Return a list of turns as messages, and the indices of those that the row says not to learn.

    Args:
        value: what the column holds.
        column: its name, for reasons.
        shape: the fields of a turn, for reasons.
        as_openai: what a turn goes through first.

    Raises:
        UnusableRowError: a turn is something else, or has fields that would be lost.
    """
    if not isinstance(value, list):
        raise UnusableRowError(f"{column} is {kind_of(value)}, expected a list of {{{shape}}}")
    if not value:
        raise UnusableRowError(f"{column} is an empty list")
    messages: list[Message] = []
    untrained: list[int] = []
    for original in value:
        turn = original if as_openai is None else as_openai(original)
        _check_fields(turn, column, shape)
        if len(turn) == 2 and "content" in turn:
            role = _read_role(turn["role"])
            messages.append({"role": role, "content": _read_content(turn["content"], role)})
            continue
        message, is_learnt = _read_rich_turn(turn)
        if not is_learnt:
            untrained.append(len(messages))
        messages.append(message)
    return messages, untrained


def _check_fields(turn: Any, column: str, shape: str) -> None:
    if not isinstance(turn, dict):
        raise UnusableRowError(f"{column} holds {kind_of(turn)}, expected {{{shape}}}")
    if "role" not in turn or ("content" not in turn and all(turn.get(name) in NOTHING for name in CALLS)):
        found = ", ".join(turn) or "none"
        hint = (
            "; data.columns: {conversations: messages} reads from, value"
            if column == "messages" and "from" in turn
            else ""
        )
        raise UnusableRowError(f"a turn in {column} has the fields {found}, expected {shape}{hint}")


def _read_role(role: Any) -> str:
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        found = f'"{role}"' if isinstance(role, str) else kind_of(role)
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
            found = f"of type {kind}" if isinstance(kind, str) else f"that is {kind_of(part)}"
            raise UnusableRowError(f"{name} has a part {found}, expected {{type: text, text: ...}}")
        texts.append(read_string(part.get("text"), name))
    return "".join(texts)


def _read_rich_turn(turn: dict[str, Any]) -> tuple[Message, bool]:
    """Return a turn that has more fields than role and content, and whether an assistant turn is learnt."""
    role = _read_role(turn["role"])
    said = {name: field for name, field in turn.items() if name not in ("role", "content") and field not in NOTHING}
    if not said:
        return {"role": role, "content": _read_content(turn["content"], role)}, True
    lost = next((name for name in said if name not in FIELDS[role]), None)
    if lost is not None:
        raise UnusableRowError(f"a turn with role {role} has the field {lost}, which training would lose; remove it")
    calls = _calls_of(said)
    content = "" if calls and turn.get("content") is None else _read_content(turn.get("content"), role)
    message: Message = {"role": role, "content": "" if calls and not content.strip() else content}
    if calls:
        message["tool_calls"] = calls
    reasoning = {read_string(said[name], name) for name in REASONING if name in said}
    if len(reasoning) > 1:
        raise UnusableRowError(f"a turn has two different texts of reasoning, expected one of {', '.join(REASONING)}")
    if reasoning:
        message["reasoning_content"] = reasoning.pop()
    if "tool_call_id" in said:
        message["tool_call_id"] = read_string(said["tool_call_id"], "tool_call_id")
    if "name" in said:
        message["name"] = read_string(said["name"], "the name of a turn with role tool")
    return message, _is_learnt(said, role)


def _calls_of(said: dict[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in CALLS if name in said]
    if len(names) > 1:
        raise UnusableRowError(f"a turn has both {' and '.join(CALLS)}, expected tool_calls")
    return read_calls(said[names[0]], names[0]) if names else []


def _is_learnt(said: dict[str, Any], role: str) -> bool:
    """Say what `train` and `weight` decide; a turn that has neither is learnt if it is the assistant's."""
    decided = {_flag(said[name], name) for name in LEARNT if name in said}
    if len(decided) > 1:
        raise UnusableRowError("a turn has train and weight that contradict each other")
    if role != "assistant":
        if True in decided:
            raise UnusableRowError(f"a turn with role {role} asks to be learnt; only assistant turns can be")
        return True
    return not decided or decided.pop()


def _flag(value: Any, name: str) -> bool:
    if name == "train" and isinstance(value, bool):
        return value
    if name == "weight" and type(value) in (int, float) and value in (0, 1):
        return bool(value)
    expected = "true or false" if name == "train" else "0 or 1"
    found = "another number" if name == "weight" and type(value) in (int, float) else kind_of(value)
    raise UnusableRowError(f"{name} of a turn is {found}, expected {expected}")


def check_turns(turns: Sequence[Message]) -> None:
    """Check that the roles alternate, that the conversation ends with an answer, and that no answer is empty.

    An assistant turn that calls functions is answered by tool turns, then the assistant goes on; a tool turn that names
    a call names one of the assistant turn before, once.

    Raises:
        UnusableRowError: with the first thing that is wrong.
    """
    if all(turn["role"] != "assistant" for turn in turns):
        raise UnusableRowError("no assistant turn to learn from")
    before: str | None = None
    called = False
    open_ids: list[str] = []
    for turn in turns:
        role = turn["role"]
        if role not in FOLLOWS[before]:
            place = "at the start" if before is None else f"after {before}"
            raise UnusableRowError(f"{role} turn {place}, expected {' or '.join(FOLLOWS[before])}")
        if role == "tool":
            _close_call(turn, open_ids)
        elif called and before == "assistant":
            raise UnusableRowError(f"{role} turn after an assistant turn with tool_calls, expected tool")
        elif role == "assistant":
            called = "tool_calls" in turn
            open_ids = [call["id"] for call in turn["tool_calls"] if "id" in call] if called else []
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
