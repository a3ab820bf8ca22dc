"""The special tokens of a tokenizer, and the convention by which it begins a text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qlora_train.data.types import Message, TokenArray, UnusableRowError

OPTIONAL_FIELDS = ("reasoning_content", "tool_calls", "tool_call_id", "name")
"""Of a turn, besides its content."""


class SpecialTokens:
    """`ids` are the tokens that a text cannot contain by accident and that can end a turn; `eos` is one of them.

    `bos` is the beginning token, None where the tokenizer has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.by_text: dict[str, int] = {**added, **named}
        # unknown characters become the unknown token: a text contains that by accident
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
        self.ids = frozenset(self.by_text.values()) - unknown
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self._is_special = np.zeros(max(len(tokenizer), *(i + 1 for i in self.ids)), np.bool_)
        self._is_special[list(self.ids)] = True
        self._pattern = re.compile("|".join(re.escape(text) for text in sorted(self.by_text, key=len, reverse=True)))
        self._beginning = _beginning(tokenizer)

    def indices_in(self, input_ids: TokenArray) -> list[int]:
        """Return the indices of the special tokens in `input_ids` (seq,), in order."""
        places: list[int] = np.flatnonzero(self._is_special[input_ids]).tolist()
        return places

    def refuse_in(self, content: str, role: str) -> None:
        """Raise UnusableRowError if a message holds the text of a special token: it would become that token."""
        match = self._pattern.search(content)
        if match:
            raise UnusableRowError(f"the content of a turn with role {role} holds the special token {match.group()}")

    def refuse_in_turns(self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """Raise UnusableRowError if anything that a template writes out holds the text of a special token."""
        if self._pattern.search("\0".join([turn["content"] for turn in turns])):
            for turn in turns:
                self.refuse_in(turn["content"], turn["role"])
        for turn in turns:
            if len(turn) > 2:  # role and content, the rest is optional
                for field in OPTIONAL_FIELDS:
                    self._refuse_in_value(turn.get(field), f"the {field} of a turn with role {turn['role']}")
        for tool in tools:
            self._refuse_in_value(tool, "the list of tools")

    def _refuse_in_value(self, value: Any, name: str) -> None:
        for text in strings_in(value):
            match = self._pattern.search(text)
            if match:
                raise UnusableRowError(f"{name} holds the special token {match.group()}")

    def starts_with_two_bos(self, input_ids: Sequence[int]) -> bool:
        """Say whether a row begins with two beginning tokens."""
        return self.bos is not None and list(input_ids[:2]) == [self.bos, self.bos]

    def bos_for(self, input_ids: list[int]) -> list[int]:
        """Return what the tokenizer puts before a plain text: its bos token or nothing; never a second one."""
        return [] if input_ids[:1] == self._beginning else list(self._beginning)


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, the names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, field in value.items():
            yield name
            yield from strings_in(field)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def _beginning(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
