"""The turns of ShareGPT, {from, value}, as turns of OpenAI's shape, {role, content}."""

from typing import Any

from qlora_train.data.field_values import NOTHING
from qlora_train.data.tool_calls import read_calls
from qlora_train.data.types import UnusableRowError

CALL = "function_call"
"""The sender of a turn whose value is the JSON of a call, or of a list of calls."""
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    CALL: "assistant",
    "observation": "tool",
    "tool": "tool",
}


def as_openai(turn: Any) -> Any:
    """Return a turn of ShareGPT as {role, content} with all its other fields; anything else as it is.

    Raises:
        UnusableRowError: nobody that is known sent it, or it says two things.
    """
    if not isinstance(turn, dict) or turn.get("from") in NOTHING or "value" not in turn:
        return turn
    sender, value = turn["from"], turn["value"]
    role = ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        found = f'"{sender}"' if isinstance(sender, str) else "no string"
        raise UnusableRowError(f"a turn is from {found}, expected {', '.join(ROLES)}")
    converted = {"role": role, "content": value}
    if len(turn) > 2:
        _add_others(turn, converted)
    if sender == CALL:
        converted |= {"content": "", "tool_calls": read_calls(value, CALL)}
    return converted


def _add_others(turn: dict[str, Any], converted: dict[str, Any]) -> None:
    for name, field in turn.items():
        if name in ("from", "value") or field in NOTHING:
            continue
        if name in converted or (name == "tool_calls" and turn["from"] == CALL):
            raise UnusableRowError(f"a turn has both from and {name}, expected from, value")
        converted[name] = field
