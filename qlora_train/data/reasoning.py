"""Thoughts inside the content of an answer -> `reasoning_content`, for chat templates that write reasoning themselves."""

import re

from qlora_train.data.types import Message, UnusableRowError

END_OF_THOUGHTS = "</think>"
INLINE = re.compile(rf"\A\s*<think>(.*?){END_OF_THOUGHTS}(.*)\Z", re.DOTALL)


def with_reasoning(turn: Message) -> Message:
    """Return an answer whose content begins with ``<think>...</think>`` with these as its reasoning; empty ones as none.

    Raises:
        UnusableRowError: nothing follows the thoughts, or the turn has reasoning beside them.
    """
    if turn["role"] != "assistant":
        return turn
    found = INLINE.fullmatch(turn["content"])
    if found is None:
        return turn
    reasoning, content = found[1].strip("\n"), found[2].lstrip("\n")
    if turn.get("reasoning_content", reasoning) != reasoning:
        raise UnusableRowError("an assistant turn has reasoning both in a field of its own and as <think>...</think>")
    if not content.strip() and "tool_calls" not in turn:
        raise UnusableRowError("an assistant turn has <think>...</think> and nothing behind it")
    split: Message = {**turn, "content": content}
    if reasoning.strip():
        split["reasoning_content"] = reasoning
    return split
