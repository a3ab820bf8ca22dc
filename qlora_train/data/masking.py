"""Where the answers of a rendered conversation begin and end: characters -> tokens."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from qlora_train.data.types import Message, TokenArray, UnusableRowError

REWRITTEN = (
    "the chat template leaves out or rewrites part of an assistant turn (reasoning of earlier turns?); "
    "data.train_on: last looks at the last turn only"
)
LOST_CALL = "the chat template leaves out or rewrites a call"
NO_END = (
    "the chat template ends an assistant turn without a special token (or with another one than when it comes last), so "
    "no end can be learnt"
)

TWO_THOUGHTS = (
    "the chat template writes thoughts of its own around an assistant turn whose content has <think> or </think> in it; "
    "write them as reasoning_content"
)
THOUGHT_TAGS = ("<think>", "</think>")
OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
MOST_OPENED = 40
"""Characters at the end of a prompt in which thoughts are opened or closed."""


class TokenizedText:
    """A text with its special tokens, its tokens, and which characters each token covers.

    Attributes:
        ids: the tokens.
        input_ids: the same, int32 (seq,).
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        encoding = tokenize(tokenizer, text)
        self.text = text
        self.ids: list[int] = encoding.ids
        self.input_ids: TokenArray = np.array(self.ids, np.int32)
        self._encoding = encoding

    @cached_property
    def _offsets(self) -> list[tuple[int, int]]:
        offsets: list[tuple[int, int]] = self._encoding.offsets
        return offsets

    def first_token_after(self, position: int) -> int:
        """Return the index of the first token with a character at or after `position`; (seq,) if there is none."""
        if position == 0:  # a tokenizer that prepends a space may give it the empty range at 0
            return 0
        if position >= len(self.text):
            return len(self.ids)
        return bisect_right(self._offsets, position, key=itemgetter(1))

    def chars_of(self, token: int) -> tuple[int, int]:
        """Return the characters [begin, end) that a token covers."""
        return self._offsets[token]


def tokenize(tokenizer: Any, text: str) -> Any:
    """Return the `tokenizers.Encoding` of a text to which nothing is added."""
    # verbose=False: no warning about the tokenizer's model_max_length; data.max_length decides
    return tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]


@dataclass(frozen=True, slots=True)
class AnswerPlace:
    """Where an answer stands in the text of its conversation, in characters.

    Attributes:
        prompt_end: where the text that inference sends ends, the generation prompt included.
        begin: where learning begins: there, or later where the template's ``{% generation %}`` block does.
        said_end: where the turn's content ends; the name of its last call where it has calls.
        end: where all that the template writes for the turn ends.
    """

    prompt_end: int
    begin: int
    said_end: int
    end: int


def answer_span(
    whole: TokenizedText, place: AnswerPlace, turn: Message, special_places: Sequence[int], eos: int
) -> tuple[int, int]:
    """Return the first token of an answer and its last: the special token that ends the turn.

    Special tokens that follow each other without anything between them end the turn together.

    Args:
        whole: the conversation.
        place: of the answer.
        turn: what the row says there.
        special_places: indices of all special tokens of `whole`, in order.
        eos: the end-of-sequence token.

    Raises:
        UnusableRowError: no special token ends the turn, or the template left out part of what the row says.
    """
    start = whole.first_token_after(place.begin)
    first, behind = (
        bisect_left(special_places, whole.first_token_after(position)) for position in (place.said_end, place.end)
    )
    num_leading = next((i for i, token in enumerate(special_places) if token != i), len(special_places))
    openers = {whole.ids[token] for token in special_places[:num_leading]} - {eos}
    ends = _before_next_turn(whole, place, special_places[first:behind], openers)
    if not ends:
        raise UnusableRowError(NO_END)
    last = len(ends) - 1 if turn.get("tool_calls") else 0  # special tokens may stand around calls
    while last + 1 < len(ends) and ends[last + 1] == ends[last] + 1:
        last += 1
    _refuse_unsaid(whole.text, place, whole.chars_of(ends[last])[0], turn)
    return start, ends[last]


def _before_next_turn(
    whole: TokenizedText, place: AnswerPlace, ends: Sequence[int], openers: Container[int]
) -> Sequence[int]:
    """Return the special tokens behind an answer up to the header of the next turn.

    Some templates write that header even where no turn follows. It begins as the conversation does (`openers`), or is
    the end of the answer's own prompt once more.
    """
    for index, token in enumerate(ends[1:], start=1):
        rest = whole.text[whole.chars_of(token)[0] :]
        if whole.ids[token] in openers or whole.text.endswith(rest, 0, place.prompt_end):
            return ends[:index]
    return ends


def _refuse_unsaid(text: str, place: AnswerPlace, end: int, turn: Message) -> None:
    """Check that the text of an answer has what the row says there, and thoughts once.

    A prompt may open the thoughts with which the answer begins.
    """
    opened = OPENED.search(text, max(0, place.prompt_end - MOST_OPENED), place.prompt_end)
    written = text[opened.start() if opened else place.prompt_end : end]
    content = turn["content"]
    is_with_tags = any(tag in content for tag in THOUGHT_TAGS)
    if is_with_tags and _has_more_thoughts(written, content, num_before=int("reasoning_content" in turn)):
        raise UnusableRowError(TWO_THOUGHTS)
    learnt = squeezed(written if is_with_tags and place.begin == place.prompt_end else text[place.begin : end])
    leaves = (leaf for call in turn.get("tool_calls", []) for leaf in _leaves(call))
    parts = (content, turn.get("reasoning_content", ""))
    if not (all(squeezed(part) in learnt for part in parts) and all(_is_said(leaf, learnt) for leaf in leaves)):
        raise UnusableRowError(REWRITTEN)


def _has_more_thoughts(written: str, content: str, num_before: int) -> bool:
    opened, closed = THOUGHT_TAGS
    num_closed = content.count(closed)
    return (
        written.count(closed) > num_closed + num_before
        or written.count(opened) > max(content.count(opened), num_closed) + num_before
    )


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
            raise UnusableRowError(LOST_CALL)


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
