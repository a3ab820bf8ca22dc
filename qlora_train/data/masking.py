"""Character spans of answers -> the tokens to train on, and the checks that an answer is complete in them."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from qlora_train.data.answer_spans import LOST_CALL, REWRITTEN, THINK_WINDOW, AnswerSpan
from qlora_train.data.reasoning import THINK_END, THINK_START
from qlora_train.data.special_tokens import SpecialTokens
from qlora_train.data.types import Message, TokenArray, UnusableRowError

NO_END = (
    "the chat template ends an assistant turn without a special token (or with another one than when it comes last), so "
    "the model cannot learn to stop"
)
TWO_THINK_BLOCKS = (
    "the chat template writes thoughts of its own around an assistant turn whose content has <think> or </think> in it; "
    "write them as reasoning_content"
)
PROMPT_OPENS_THINKING = re.compile(rf"{THINK_START}\s*(?:{THINK_END}\s*)?\Z")


class TokenizedText:
    """A text with its special tokens, its tokens, and the characters that each covers.

    Attributes:
        ids: the tokens.
        input_ids: the same, int32 (seq,).
        special: indices of the special tokens, in order.
        eos: the end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, special: SpecialTokens, text: str) -> None:
        encoding = tokenize(tokenizer, text)
        self.text = text
        self.ids: list[int] = encoding.ids
        self.input_ids: TokenArray = np.array(self.ids, np.int32)
        self.special, self.eos = special.indices_in(self.input_ids), special.eos
        self._encoding = encoding

    @cached_property
    def _offsets(self) -> list[tuple[int, int]]:
        offsets: list[tuple[int, int]] = self._encoding.offsets
        return offsets

    def first_token_from(self, position: int) -> int:
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


def answer_tokens(whole: TokenizedText, span: AnswerSpan, turn: Message) -> tuple[int, int]:
    """Return the first and the last token of an answer; the last is the special token that ends the turn.

    Special tokens that follow each other without anything between them end the turn together.

    Args:
        turn: the answer as the row has it.

    Raises:
        UnusableRowError: no special token ends the turn, or the text lacks a part of it.
    """
    first, behind = (bisect_left(whole.special, whole.first_token_from(it)) for it in (span.content_end, span.end))
    ends = _before_next_header(whole, span, whole.special[first:behind])
    if not ends:
        raise UnusableRowError(NO_END)
    last = len(ends) - 1 if turn.get("tool_calls") else 0  # special tokens may enclose calls
    while last + 1 < len(ends) and ends[last + 1] == ends[last] + 1:
        last += 1
    _refuse_incomplete(whole.text, span, whole.chars_of(ends[last])[0], turn)
    return whole.first_token_from(span.begin), ends[last]


def _before_next_header(whole: TokenizedText, span: AnswerSpan, ends: Sequence[int]) -> Sequence[int]:
    """Return the special tokens behind an answer up to the header of the next turn.

    Some templates write that header even where no turn follows. It begins with a token that begins the conversation, or
    repeats the end of the answer's own prompt.
    """
    num_leading = next((i for i, token in enumerate(whole.special) if token != i), len(whole.special))
    openers = {whole.ids[token] for token in whole.special[:num_leading]} - {whole.eos}
    for index, token in enumerate(ends[1:], start=1):
        rest = whole.text[whole.chars_of(token)[0] :]
        if whole.ids[token] in openers or whole.text.endswith(rest, 0, span.prompt_end):
            return ends[:index]
    return ends


def _refuse_incomplete(text: str, span: AnswerSpan, end: int, turn: Message) -> None:
    """Check that the text of an answer up to `end` has all that the row has, and reasoning once.

    A prompt may open the think block with which the answer begins.
    """
    opened = PROMPT_OPENS_THINKING.search(text, max(0, span.prompt_end - THINK_WINDOW), span.prompt_end)
    written = text[opened.start() if opened else span.prompt_end : end]
    content = turn["content"]
    has_tags = THINK_START in content or THINK_END in content
    if has_tags and _has_more_thoughts(written, content, num_before=int("reasoning_content" in turn)):
        raise UnusableRowError(TWO_THINK_BLOCKS)
    trained = squeezed(written if has_tags and span.begin == span.prompt_end else text[span.begin : end])
    is_complete = all(squeezed(part) in trained for part in (content, turn.get("reasoning_content", "")))
    if not is_complete or not _has_calls(turn, trained):
        raise UnusableRowError(REWRITTEN)


def _has_more_thoughts(written: str, content: str, num_before: int) -> bool:
    num_closed = content.count(THINK_END)
    return (
        written.count(THINK_END) > num_closed + num_before
        or written.count(THINK_START) > max(content.count(THINK_START), num_closed) + num_before
    )


def refuse_lost_tools(
    text: str, without_tools: str, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> None:
    """Check that a text has the tools, calls and results of its conversation, which many templates leave out silently.

    Args:
        without_tools: the same conversation rendered without `tools`.
        tools: functions that may be called.

    Raises:
        UnusableRowError: one is missing.
    """
    everything = squeezed(text)
    if tools and (text == without_tools or not all(_is_in(it["function"]["name"], everything) for it in tools)):
        raise UnusableRowError("the chat template does not print tools; set model.chat_template to one that does")
    for turn in turns:
        if turn["role"] == "tool" and not _is_in(turn["content"], everything):
            raise UnusableRowError("the chat template leaves out or rewrites what a tool returned")
        if not _has_calls(turn, everything):
            raise UnusableRowError(LOST_CALL)


def squeezed(text: str) -> str:
    """Return a text without its white space, which templates change."""
    return "".join(text.split())


def _has_calls(turn: Message, text: str) -> bool:
    """Return whether a squeezed text has every name and value of a turn's tool calls."""
    return all(_is_in(leaf, text) for call in turn.get("tool_calls", []) for leaf in _leaves(call["function"]))


def _leaves(function: Mapping[str, Any]) -> Iterator[Any]:
    yield function["name"]
    pending = [function["arguments"]]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            yield from value
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield value


def _is_in(leaf: Any, text: str) -> bool:
    """Return whether a squeezed text has a name or value, as it is or as JSON."""
    if not isinstance(leaf, str):
        return json.dumps(leaf) in text
    forms = (leaf, json.dumps(leaf, ensure_ascii=False)[1:-1], json.dumps(leaf)[1:-1])
    return any(squeezed(form) in text for form in forms)
