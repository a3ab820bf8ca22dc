"""A tokenised row as text again, cut where its loss mask changes: what the model reads, special tokens included."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qlora_train.data.types import Example

MOST_BYTES = 4
"""Bytes of a character in UTF-8, and so the most tokens that one can be made of."""


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row for people to read.

    Attributes:
        where: ``file:line``.
        num_tokens: tokens.
        num_labels: tokens with loss.
        segments: the text in pieces, each with whether it carries loss; joined they are the whole row. A character whose
            tokens lie on both sides of a border stands behind it.
        notes: what is to be known about the row.
    """

    where: str
    num_tokens: int
    num_labels: int
    segments: tuple[tuple[str, bool], ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "where": self.where,
            "num_tokens": self.num_tokens,
            "num_labels": self.num_labels,
            "warnings": list(self.warnings),
            "segments": [{"text": text, "trained": trained} for text, trained in self.segments],
        }


def render_rows(examples: Iterable[Example], tokenizer: Any) -> tuple[RenderedRow, ...]:
    """Return the rows as text, with the tokenizer that made them."""
    return tuple(_rendered(example, tokenizer) for example in examples)


def _rendered(example: Example, tokenizer: Any) -> RenderedRow:
    mask, ids = example.loss_mask, example.input_ids.tolist()
    whole = _decoded(tokenizer, ids)
    borders, places = [0], [0]
    for border in (np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist():
        borders.append(border)
        places.append(max(places[-1], _place(tokenizer, ids, border, whole)))
    places.append(len(whole))
    pieces = (whole[begin:end] for begin, end in pairwise(places))
    trained = (bool(mask[border]) for border in borders)
    segments = tuple(zip(pieces, trained, strict=True))
    return RenderedRow(example.where, len(ids), int(np.count_nonzero(mask)), segments, example.warnings)


def _place(tokenizer: Any, ids: list[int], border: int, whole: str) -> int:
    """Return where in the whole text the tokens before a border end.

    A token means other text alone than after others (white space, parts of characters), so that the whole beginning is
    decoded; one that ends inside a character decodes to something else there, and is shortened.
    """
    for end in range(border, max(0, border - MOST_BYTES), -1):
        beginning = _decoded(tokenizer, ids[:end])
        if whole.startswith(beginning):
            return len(beginning)
    return 0


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
