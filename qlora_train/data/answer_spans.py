"""Where the answers of a conversation are in its rendered text: the definition, with one rendering per answer.

An answer begins where its prompt ends. The prompt is what inference sends: the turns before the answer and the
generation prompt. It must be a prefix of the whole text, otherwise training and inference would differ. The answer's end
is found by rendering once more with a marker behind its content, and by comparing what follows with the rendering in
which the answer comes last (or, if it is the last, is followed by tool results): the part that both share is its own.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from qlora_train.data.chat_template import ChatRenderer
from qlora_train.data.types import Message, UnusableRowError

REWRITTEN = (
    "the chat template leaves out or rewrites part of an assistant turn (reasoning of earlier turns?); "
    "data.train_on: last looks at the last turn only"
)
LOST_CALL = "the chat template leaves out or rewrites a call"
UNSTABLE = "the chat template writes an answer differently depending on its last words, so its end cannot be found"
THINK_WINDOW = 40
"""Characters at the end of a prompt in which a template may open or close a think block."""
END_MARKER = re.compile("endOfAnswer\\d+X")
"""Put behind an answer's content, or the name of its last call. ASCII: templates escape other characters in JSON."""


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """Character positions of an answer in the text of its conversation.

    Attributes:
        prompt_end: end of the text that inference sends, generation prompt included.
        begin: first trained character: `prompt_end`, or later where the ``{% generation %}`` block begins later.
        content_end: end of the turn's content, or of the name of its last call.
        end: end of all that the template writes for the turn.
    """

    prompt_end: int
    begin: int
    content_end: int
    end: int


def find_answers(
    chat: ChatRenderer, turns: Sequence[Message], text: str, answers: Sequence[int]
) -> dict[int, AnswerSpan]:
    """Find the assistant turns with the indices `answers` in `text`, the rendering of `turns`.

    Raises:
        UnusableRowError: a prompt is no prefix of the text, or an answer is rewritten or has no generation block.
        jinja2.exceptions.TemplateError: the template refuses the turns before an answer.
    """
    blocks = chat.generation_blocks(turns)
    marked = [_with_end_marker(turn, i) if i in answers else turn for i, turn in enumerate(turns)]
    marked_text = chat.text(marked)
    if END_MARKER.sub("", marked_text) != text:
        raise UnusableRowError(UNSTABLE)
    spans = {}
    for answer in answers:
        prompt = chat.text(turns[:answer], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise UnusableRowError(_why_prompt_differs(chat, turns[:answer], text, prompt))
        before, marker, _ = marked_text.partition(_end_marker(answer))
        if not marker:
            raise UnusableRowError(LOST_CALL if "tool_calls" in turns[answer] else REWRITTEN)
        content_end = len(END_MARKER.sub("", before))
        end = content_end + _length_of_ending(chat, marked, answer, text[content_end:])
        spans[answer] = AnswerSpan(len(prompt), first_trained(blocks, len(prompt)), content_end, end)
    return spans


def _why_prompt_differs(chat: ChatRenderer, before: Sequence[Message], text: str, prompt: str) -> str:
    reason = "it drops or rewrites earlier turns"
    if text.startswith(chat.text(before)):
        reason = "the answer does not begin as the generation prompt ends"
        if "think" in prompt[-THINK_WINDOW:]:
            reason += ": thoughts are opened or closed there, and not so in this answer"
    return f"the chat template renders the prompt of an answer differently with the answer behind it ({reason})"


def _end_marker(answer: int) -> str:
    return f"endOfAnswer{answer}X"


def _with_end_marker(turn: Message, answer: int) -> Message:
    """Mark the end of an answer's content; the name of its last call where it has calls.

    Text that a template writes only for a last turn, such as an empty think block, comes before either.
    """
    marker = _end_marker(answer)
    calls = turn.get("tool_calls")
    if not calls:
        content = turn["content"].rstrip()
        return {**turn, "content": content + marker + turn["content"][len(content) :]}
    function = {**calls[-1]["function"], "name": calls[-1]["function"]["name"] + marker}
    return {**turn, "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}


def _length_of_ending(chat: ChatRenderer, marked: Sequence[Message], answer: int, behind: str) -> int:
    """Return how much of `behind`, the text behind an answer's marker, belongs to the answer.

    That is what the template also writes where the answer comes last or, for a last turn with calls, does not.
    """
    if answer + 1 < len(marked):
        other = chat.text(marked[: answer + 1])
    elif "tool_calls" in marked[answer]:
        try:
            other = chat.text([*marked, *map(_result_of, marked[answer]["tool_calls"])])
        except TemplateError:
            return len(behind)
    else:
        return len(behind)
    _, found, other_behind = other.partition(_end_marker(answer))
    if not found:
        raise UnusableRowError(REWRITTEN)
    return common_prefix_length(END_MARKER.sub("", other_behind), behind)


def _result_of(call: Mapping[str, Any]) -> Message:
    result: Message = {"role": "tool", "content": "0", "name": call["function"]["name"]}
    return {**result, "tool_call_id": call["id"]} if "id" in call else result


def first_trained(blocks: Sequence[tuple[int, int]] | None, prompt_end: int) -> int:
    """Return where the labels of an answer begin: at the end of its prompt, or of its later generation block."""
    if blocks is None:
        return prompt_end
    begin = next((begin for begin, end in blocks if end > prompt_end), None)
    if begin is None:
        raise UnusableRowError("the chat template marks some answers with generation blocks, but not all of them")
    return max(prompt_end, begin)


def common_prefix_length(text: str, other: str) -> int:
    """Return how many characters two texts share at their beginning."""
    return bisect_left(range(len(text)), True, key=lambda length: not other.startswith(text[: length + 1]))


def refuse_lost_turns(chat: ChatRenderer, turns: Sequence[Message]) -> None:
    """Raise UnusableRowError if the template leaves out a system or user turn.

    Each gets a marker of its own: the text of a turn may occur elsewhere in the conversation.
    """
    markers = {
        index: f"\ue000{index}\ue001"
        for index, turn in enumerate(turns)
        if turn["role"] in ("system", "user") and turn["content"].strip()
    }
    marked: list[Message] = [{**turn, "content": turn["content"] + markers.get(i, "")} for i, turn in enumerate(turns)]
    text = chat.text(marked)
    lost = {turns[index]["role"] for index, marker in markers.items() if marker not in text}
    if "system" in lost:
        raise UnusableRowError(
            "the chat template leaves out the system turn; set model.chat_template to one that writes it, or move its text "
            "into the first user turn"
        )
    if lost:
        raise UnusableRowError(
            "the chat template leaves out a user turn; set model.chat_template to one that writes it"
        )
