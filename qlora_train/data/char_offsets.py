"""The tokens of a text and which of its characters each stands for, as the Rust tokenizer says."""

from bisect import bisect_right
from functools import cached_property
from typing import Any, Protocol

MANY_PLACES = 64
"""From so many look-ups on, a list of all offsets costs less than asking for each: that scans the tokens every time."""


class TextTokens(Protocol):
    """The tokens of a text, in order, and their places in it."""

    @property
    def ids(self) -> list[int]:
        """The tokens."""

    def first_token_after(self, position: int) -> int:
        """Return the index of the first token with a character at or after `position`; their number if there is none."""

    def chars_of(self, token: int) -> tuple[int, int]:
        """Return the characters [begin, end) that a token stands for."""


class WholeText:
    """The tokens of a text that was tokenised in one go.

    Args:
        encoding: a `tokenizers.Encoding`.
    """

    def __init__(self, encoding: Any) -> None:
        self.ids: list[int] = encoding.ids
        self._encoding = encoding
        self._num_asked = 0

    @cached_property
    def ends(self) -> list[int]:
        """Where the characters of each token end."""
        return [end for _, end in self._encoding.offsets]

    def first_token_after(self, position: int) -> int:
        """Return the index of the first token with a character at or after `position`; their number if there is none."""
        if position == 0:  # the offsets of a space there may be those of nothing
            return 0
        self._num_asked += 1
        if self._num_asked <= MANY_PLACES:
            token: int | None = self._encoding.char_to_token(position)
            if token is not None:
                return token
        return bisect_right(self.ends, position)

    def chars_of(self, token: int) -> tuple[int, int]:
        """Return the characters [begin, end) that a token stands for."""
        begin, end = self._encoding.token_to_chars(token)
        return begin, end
