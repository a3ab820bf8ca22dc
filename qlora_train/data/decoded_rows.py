"""A tokenised row as text again, cut where its loss mask changes: what the model reads, special tokens included."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from qlora_train.data.types import Example

MAX_TOKENS_PER_CHARACTER = 4
"""Bytes of a character in UTF-8, and so the most tokens that it can consist of."""


@dataclass(frozen=True, slots=True)
class DecodedRow:
    """A row for people to read.

    `segments` are parts of the text, each with whether it is trained; joined they are the whole row. A character whose
    tokens are on both sides of a border belongs to the later segment. `answer` is ``chosen`` or ``rejected`` for the
    sequences of a preference pair, which follow each other.
    """

    where: str
    num_tokens: int
    num_labels: int
    segments: tuple[tuple[str, bool], ...]
    warnings: tuple[str, ...] = ()
    answer: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "where": self.where,
            "num_tokens": self.num_tokens,
            "num_labels": self.num_labels,
            "warnings": list(self.warnings),
            "segments": [{"text": text, "trained": trained} for text, trained in self.segments],
        }


def decode_rows(examples: Iterable[Example], tokenizer: Any) -> tuple[DecodedRow, ...]:
    """Decode rows with the tokenizer that made them."""
    return tuple(row for example in examples for row in _decoded_row(example, tokenizer))


def _decoded_row(example: Example, tokenizer: Any) -> list[DecodedRow]:
    """Return a row, or the chosen and the rejected sequence of a pair."""
    if example.desirable is not None:
        label = "desirable" if example.desirable else "undesirable"
        return [_decoded_example(example, f"{example.where} ({label})", tokenizer)]
    if example.rejected is None:
        return [_decoded_example(example, example.where, tokenizer)]
    return [
        replace(_decoded_example(sequence, f"{example.where} ({answer})", tokenizer), answer=answer)
        for sequence, answer in zip(example.sequences, ("chosen", "rejected"), strict=True)
    ]


def _decoded_example(example: Example, where: str, tokenizer: Any) -> DecodedRow:
    mask, ids = example.loss_mask, example.input_ids.tolist()
    text = _decoded(tokenizer, ids)
    token_borders, char_borders = [0], [0]
    for border in (np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist():
        token_borders.append(border)
        char_borders.append(max(char_borders[-1], _char_border(tokenizer, ids, border, text)))
    char_borders.append(len(text))
    parts = (text[begin:end] for begin, end in pairwise(char_borders))
    segments = tuple((part, bool(mask[border])) for part, border in zip(parts, token_borders, strict=True))
    return DecodedRow(where, len(ids), int(np.count_nonzero(mask)), segments, example.warnings)


def _char_border(tokenizer: Any, ids: list[int], border: int, text: str) -> int:
    """Return the position in `text` where the tokens before a border end.

    The whole beginning is decoded, since a token may mean other text alone (white space, parts of characters). If it ends
    inside a character, it decodes to something else there and is shortened.
    """
    for end in range(border, max(0, border - MAX_TOKENS_PER_CHARACTER), -1):
        beginning = _decoded(tokenizer, ids[:end])
        if text.startswith(beginning):
            return len(beginning)
    return 0


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
