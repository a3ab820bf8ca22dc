"""The special tokens of a tokenizer, and the convention by which it begins a text."""

import re
from typing import Any

from qlora_train.data.types import UnusableRowError


class SpecialTokens:
    """`ids` are the tokens that a text cannot contain by accident and that can end a turn; `eos` is one of them."""

    def __init__(self, tokenizer: Any) -> None:
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.by_text: dict[str, int] = {**added, **named}
        self.ids = frozenset(self.by_text.values())
        self.eos: int = tokenizer.eos_token_id
        self._pattern = re.compile("|".join(re.escape(text) for text in sorted(self.by_text, key=len, reverse=True)))
        self._beginning = _beginning(tokenizer)

    def refuse_in(self, content: str, role: str) -> None:
        """Raise UnusableRowError if a message holds the text of a special token: it would become that token."""
        match = self._pattern.search(content)
        if match:
            raise UnusableRowError(f"the content of a turn with role {role} holds the special token {match.group()}")

    def beginning_for(self, input_ids: list[int]) -> list[int]:
        """Return what the tokenizer puts before a plain text: its bos token or nothing; never a second one."""
        return [] if input_ids[:1] == self._beginning else list(self._beginning)


def _beginning(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
