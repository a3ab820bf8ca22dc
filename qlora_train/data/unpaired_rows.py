"""One row of an unpaired preference: a prompt with one answer, and whether that answer is desirable."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_train.data.conversation import read_turns
from qlora_train.data.format_readers import conversation_row, from_prompt_completion
from qlora_train.data.readers import json_type
from qlora_train.data.types import Row, UnusableRowError

LABELS = {"true": True, "1": True, "false": False, "0": False}
"""Labels as text, which CSV files have; the case does not matter."""


def from_unpaired_preference(where: str, values: Mapping[str, Any]) -> Row:
    """Read TRL's shape: prompt and completion, as strings or as turns, with a label."""
    desirable = read_label(values["label"])
    return replace(from_prompt_completion(where, values), desirable=desirable)


def from_unpaired_messages(where: str, values: Mapping[str, Any]) -> Row:
    """Read a whole conversation with a label of its last turn, the shape of LLaMA-Factory and ms-swift."""
    desirable = read_label(values["label"])
    turns, untrained = read_turns(values["messages"], "messages", sharegpt=True)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UnusableRowError("the last turn of messages is not an answer, which label is about")
    row = conversation_row(where, values, turns, untrained, loss_from=len(turns) - 1)
    return replace(row, desirable=desirable)


def read_label(value: Any) -> bool:
    """Return whether an answer is desirable: a boolean, 0 or 1, or one of these as text."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in LABELS:
        return LABELS[value.strip().lower()]
    found = "another string" if isinstance(value, str) else "another number" if isinstance(value, int | float) else None
    raise UnusableRowError(
        f"label is {found or json_type(value)}, expected true for a desirable answer or false (also 1 or 0)"
    )
