"""Where the answers of a rendered conversation begin and end: characters -> tokens."""

import json
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qlora_train.data.types import Message, TokenArray, UnusableRowError

log = logging.getLogger("qlora_train")

MANY_PLACES = 64
"""From so many look-ups on, a list of all offsets costs less than asking for each: that scans the tokens every time."""
MOST_CHECKED = 16
REWRITTEN = (
    "the chat template leaves out or rewrites part of an assistant turn (reasoning of earlier turns?); "
    "data.loss_on: last looks at the last turn only"
)
NO_END = (
    "the chat template ends an assistant turn without a special token (or with another one than when it comes last), so "
    "no end can be learnt"
)
ENCODER_PROBE = "  One two,\n\nthree\t4 \u00e9 \U0001f600 "


class Encoder:
    """Tokenises texts that have their special tokens already, as the tokenizer does, without the cost of its wrapper.

    Transformers' own call spends as much time around the Rust tokenizer as in it. It is asked only where the two give
    different tokens, which `check` finds out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._is_plain = True
        self._num_checked = 0
        self.check(ENCODER_PROBE + "".join(tokenizer.all_special_tokens))

    def __call__(self, text: str) -> Any:
        """Return the `tokenizers.Encoding` of `text`, without anything added."""
        if not self._is_plain:
            return self._by_wrapper(text)
        if self._backend.truncation is not None or self._backend.padding is not None:
            self._by_wrapper("")  # another call left its settings in the tokenizer; this one takes them out
        return self._backend.encode(text, add_special_tokens=False)

    def check(self, text: str) -> None:
        """Compare the tokens of `text` with those of the tokenizer's own call; from the first difference on, use it.

        The first few texts are compared: that costs as much as several rows.
        """
        self._num_checked += 1
        if self._num_checked > MOST_CHECKED:
            return
        expected = self._by_wrapper(text).ids
        if self._is_plain and self(text).ids != expected:
            log.warning(
                "tokenizer: %s changes what its Rust tokenizer makes of a text; rows take its own slower way",
                type(self._tokenizer).__name__,
            )
            self._is_plain = False

    def _by_wrapper(self, text: str) -> Any:
        # verbose=False: no warning about the tokenizer's own idea of a maximum; data.max_length decides
        return self._tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]


class Rendering:
    """A text and its tokens.

    Args:
        text: with its special tokens.
        encoding: what `Encoder` made of it.

    Attributes:
        input_ids: int32 (seq,).
    """

    def __init__(self, text: str, encoding: Any) -> None:
        self.text = text
        self.ids: list[int] = encoding.ids
        self.input_ids: TokenArray = np.array(self.ids, np.int32)
        self._encoding = encoding
        self._num_asked = 0

    @cached_property
    def _ends(self) -> list[int]:
        return [end for _, end in self._encoding.offsets]

    def first_token_after(self, position: int) -> int:
        """Return the index of the first token with a character at or after `position`; (seq,) if there is none."""
        if position >= len(self.text):
            return len(self.ids)
        self._num_asked += 1
        if self._num_asked <= MANY_PLACES:
            token: int | None = self._encoding.char_to_token(position)
            if token is not None:
                return token
        return bisect_right(self._ends, position)

    def chars_of(self, token: int) -> tuple[int, int]:
        """Return the characters [begin, end) that a token stands for."""
        begin, end = self._encoding.token_to_chars(token)
        return begin, end


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
    inside = special_places[
        bisect_left(special_places, start) : bisect_left(special_places, whole.first_token_after(place.end))
    ]
    if place.content_end is None:
        last = _last_special(whole, place.begin, place.end, inside, turn)
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
