"""Where the answers of a rendered conversation begin and end: characters -> tokens."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_train.data.encodings import TextTokens
from qlora_train.data.types import Message, TokenArray, UnusableRowError

REWRITTEN = (
    "the chat template leaves out or rewrites part of an assistant turn (reasoning of earlier turns?); "
    "data.loss_on: last looks at the last turn only"
)
NO_END = (
    "the chat template ends an assistant turn without a special token (or with another one than when it comes last), so "
    "no end can be learnt"
)


class Rendering:
    """A text and its tokens.

    Args:
        text: with its special tokens.
        tokens: what `Encoder` made of it.

    Attributes:
        input_ids: int32 (seq,).
    """

    def __init__(self, text: str, tokens: TextTokens) -> None:
        self.text = text
        self.ids = tokens.ids
        self.input_ids: TokenArray = np.array(self.ids, np.int32)
        self.chars_of = tokens.chars_of
        self._first_token_after = tokens.first_token_after

    def first_token_after(self, position: int) -> int:
        """Return the index of the first token with a character at or after `position`; (seq,) if there is none."""
        return len(self.ids) if position >= len(self.text) else self._first_token_after(position)


@dataclass(frozen=True, slots=True)
class AnswerPlace:
    """Where an answer stands in the text of its conversation, in characters.

    Attributes:
        prompt_end: where the text that inference sends ends, the generation prompt included.
        begin: where learning begins: there, or later where the template's ``{% generation %}`` block does.
        content_end: where the turn's content ends; None where the template rewrites it.
        end: where all that the template writes for the turn ends.
    """

    prompt_end: int
    begin: int
    content_end: int | None
    end: int


def answer_span(whole: Rendering, place: AnswerPlace, turn: Message, special_places: Sequence[int]) -> tuple[int, int]:
    """Return the first token of an answer and its last: the special token that ends the turn.

    Special tokens that follow each other without anything between them end the turn together.

    Args:
        whole: the conversation.
        place: of the answer.
        turn: what the row says there.
        special_places: indices of all special tokens of `whole`, in order.

    Raises:
        UnusableRowError: no special token ends the turn, or the template left out part of what the row says.
    """
    start = whole.first_token_after(place.begin)
    first, behind = (bisect_left(special_places, token) for token in (start, whole.first_token_after(place.end)))
    inside = special_places[first:behind]
    if place.content_end is None:
        # the end is where two texts differ, which may be within a special token: that one does not belong to the turn
        borders = [whole.chars_of(token)[0] for token in special_places[behind : behind + 1]]
        last = _last_special(whole, place.begin, min([place.end, *borders]), inside, turn)
    else:
        last = bisect_left(inside, whole.first_token_after(place.content_end))
    if last >= len(inside):
        raise UnusableRowError(NO_END)
    while last + 1 < len(inside) and inside[last + 1] == inside[last] + 1:
        last += 1
    return start, inside[last]


def _last_special(whole: Rendering, begin: int, end: int, inside: Sequence[int], turn: Message) -> int:
    """Return which of the special tokens `inside` an answer stands behind everything that the row says there."""
    content = squeezed(turn["content"])
    behind = whole.text[whole.chars_of(inside[-1])[1] : end] if inside else ""
    if not inside or (content and content in squeezed(behind)):
        return len(inside)
    places = [whole.chars_of(token) for token in inside]
    begins = [begin, *(end for _, end in places)]
    gaps = [squeezed(whole.text[at:end]) for at, (end, _) in zip(begins, places, strict=False)]
    everything = squeezed(whole.text[begin : places[-1][1]])
    reasoning = squeezed(turn.get("reasoning_content", ""))
    holding = [index for index, gap in enumerate(gaps) if content in gap]
    calls = turn.get("tool_calls", [])
    is_said = any(reasoning in gap for gap in gaps) and all(
        _is_said(leaf, everything) for call in calls for leaf in _leaves(call)
    )
    if not holding or not is_said:
        raise UnusableRowError(REWRITTEN)
    return len(inside) - 1 if calls else holding[-1]


def refuse_lost(text: str, without_tools: str, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Check that a conversation's text has what a template for plain chats leaves out in silence.

    Args:
        text: the conversation's.
        without_tools: that of the same conversation without functions.
        turns: the conversation.
        tools: functions that may be called.

    Raises:
        UnusableRowError: it lacks a function, a call, or what a function returned.
    """
    everything = squeezed(text)
    if tools and (text == without_tools or not all(_is_said(it["function"]["name"], everything) for it in tools)):
        raise UnusableRowError("the chat template does not print tools; set model.chat_template to one that does")
    for turn in turns:
        if turn["role"] == "tool" and not _is_said(turn["content"], everything):
            raise UnusableRowError("the chat template leaves out or rewrites what a tool returned")
        if not all(_is_said(leaf, everything) for call in turn.get("tool_calls", []) for leaf in _leaves(call)):
            raise UnusableRowError("the chat template leaves out or rewrites a call")


def squeezed(text: str) -> str:
    """Return a text without its white space, which templates change."""
    return "".join(text.split())


def _leaves(call: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the name of a tool call, and every name and value of its arguments."""
    function = call.get("function", call)
    yield function["name"]
    pending = [function.get("arguments")]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            yield from value
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield value


def _is_said(leaf: Any, text: str) -> bool:
    """Say whether a name or value stands in a squeezed text, as it is or as JSON has it."""
    if not isinstance(leaf, str):
        return json.dumps(leaf) in text
    forms = (leaf, json.dumps(leaf, ensure_ascii=False)[1:-1], json.dumps(leaf)[1:-1])
    return any(squeezed(form) in text for form in forms)
