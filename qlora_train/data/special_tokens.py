"""The special tokens of a tokenizer, and whether it begins plain texts with one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qlora_train.data.types import Message, TokenArray, UnusableRowError

OPTIONAL_FIELDS = ("reasoning_content", "tool_calls", "tool_call_id", "name")
"""Fields of a turn besides role and content."""


class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        ids: tokens that a text cannot contain by accident and that can end a turn.
        eos: the end-of-sequence token, one of `ids`.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        by_text: dict[str, int] = {**added, **named}
        # unknown characters become the unknown token: a text contains that by accident
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
        self.ids = frozenset(by_text.values()) - unknown
        self.eos: int = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        self._is_special = np.zeros(max(len(tokenizer), *(i + 1 for i in self.ids)), np.bool_)
        self._is_special[list(self.ids)] = True
        self._pattern = re.compile("|".join(re.escape(text) for text in sorted(by_text, key=len, reverse=True)))
        self._adds_bos = self._bos is not None and tokenizer("")["input_ids"][:1] == [self._bos]

    def indices_in(self, input_ids: TokenArray) -> list[int]:
        """Return the indices of the special tokens in `input_ids` (seq,), in order."""
        indices: list[int] = np.flatnonzero(self._is_special[input_ids]).tolist()
        return indices

    def refuse_in_turns(self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """Raise UnusableRowError if the row's texts contain that of a special token: it would become that token."""
        for turn in turns:
            self._refuse_in(turn["content"], f"the content of a turn with role {turn['role']}")
        for turn in turns:
            if len(turn) > 2:
                for field in OPTIONAL_FIELDS:
                    self._refuse_in(turn.get(field), f"the {field} of a turn with role {turn['role']}")
        for tool in tools:
            self._refuse_in(tool, "the list of tools")

    def _refuse_in(self, value: Any, name: str) -> None:
        for text in _strings_in(value):
            match = self._pattern.search(text)
            if match:
                raise UnusableRowError(f"{name} holds the special token {match.group()}")

    def starts_with_two_bos(self, input_ids: Sequence[int]) -> bool:
        """Return whether a row begins with the beginning token twice."""
        return self._bos is not None and list(input_ids[:2]) == [self._bos, self._bos]

    def bos_for(self, input_ids: list[int]) -> list[int]:
        """Return the tokens to prepend to a plain text: bos if the tokenizer adds it and the text lacks it."""
        return [self._bos] if self._adds_bos and self._bos is not None and input_ids[:1] != [self._bos] else []


def _strings_in(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, field in value.items():
            yield name
            yield from _strings_in(field)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings_in(item)
