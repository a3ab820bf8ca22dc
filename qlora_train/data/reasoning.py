"""``<think>`` blocks in answers -> `reasoning_content`, for chat templates that write reasoning themselves."""

import re

from qlora_train.data.types import Message, UnusableRowError

THINK_START, THINK_END = "<think>", "</think>"
THINK_BLOCK = re.compile(rf"\A\s*{THINK_START}(.*?){THINK_END}(.*)\Z", re.DOTALL)
"""A text that begins with a think block: its reasoning, and the answer behind it."""


def with_reasoning(turn: Message) -> Message:
    """Move a think block at the start of an answer to its `reasoning_content`; an empty block is removed.

    Raises:
        UnusableRowError: nothing follows the block, or the turn has reasoning beside it.
    """
    found = THINK_BLOCK.fullmatch(turn["content"]) if turn["role"] == "assistant" else None
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
