"""What becomes of a row that is longer than `data.max_length`: `data.overflow` says."""

import dataclasses
from typing import Literal

import numpy as np

from qlora_train.data.types import Example, MaskArray, TokenArray, UnusableRowError
from qlora_train.utils.errors import DataError

Overflow = Literal["drop", "refuse", "truncate", "keep_end", "keep_answer", "split"]
CUT_AT_THE_END = "cut at the end to data.max_length"
CUT_AT_THE_BEGINNING = "cut at the beginning to data.max_length"
CUT_BEFORE_THE_ANSWER = "cut before the last answer to data.max_length"
SPLIT = "split into pieces of data.max_length"
ANSWER_CUT = "the answer is cut"
EARLIER_ANSWERS_CUT = "earlier answers are cut"


def fit(example: Example, *, max_length: int, overflow: Overflow, bos: int | None) -> list[Example]:
    """Return a row in pieces of at most `max_length` tokens, each with a label: the row itself if it is short enough.

    The first token of a piece is no label, since nothing predicts it. A cut is noted once a row, on
    the first piece, which alone keeps the row's prompt and answer.

    Args:
        example: a row with a label.
        max_length: tokens.
        overflow: `drop`, `refuse`, `truncate` (cut the end), `keep_end` (cut the beginning), `keep_answer` (keep the
            last answer and what fits before it, and the beginning token) or `split` (into pieces that share a token).
        bos: the tokenizer's beginning token.

    Raises:
        UnusableRowError: the row is too long and is dropped, or a cut would leave it without a label.
        DataError: the row is too long and `overflow` is `refuse`.
    """
    length = len(example.input_ids)
    if length <= max_length:
        return [example]
    if overflow == "drop":
        raise UnusableRowError(f"longer than data.max_length ({max_length} tokens)")
    if overflow == "refuse":
        raise DataError(
            f"{example.where}: found a row of {length} tokens; data.max_length allows {max_length}; raise it, shorten "
            "the row, or set data.overflow to drop, truncate, keep_end, keep_answer or split"
        )
    if overflow == "split":
        return _split(example, max_length)
    if overflow == "truncate":
        return [_truncated(example, max_length)]
    if overflow == "keep_end":
        return [_end_kept(example, max_length)]
    return [_answer_kept(example, max_length, bos)]


def _truncated(example: Example, max_length: int) -> Example:
    ids, mask = example.input_ids[:max_length], example.loss_mask[:max_length]
    return _cut(example, ids, mask, max_length, CUT_AT_THE_END, ANSWER_CUT)


def _end_kept(example: Example, max_length: int) -> Example:
    ids, mask = example.input_ids[-max_length:], example.loss_mask[-max_length:].copy()
    mask[0] = False
    return _cut(example, ids, mask, max_length, CUT_AT_THE_BEGINNING, ANSWER_CUT)


def _answer_kept(example: Example, max_length: int, bos: int | None) -> Example:
    behind = int(np.flatnonzero(example.loss_mask)[-1]) + 1  # what follows the last answer teaches nothing
    ids, mask = example.input_ids[:behind], example.loss_mask[:behind]
    begins = int(bos is not None and ids[0] == bos)
    num_kept = min(max_length, len(ids)) - begins
    if len(ids) - _begin_of_last_answer(mask) > max_length - 1:  # one token at least must stand before it
        raise UnusableRowError(f"the last answer alone is longer than data.max_length ({max_length} tokens)")
    kept_ids = np.concatenate([ids[:begins], ids[-num_kept:]])
    kept_mask = np.concatenate([mask[:begins], mask[-num_kept:]])
    kept_mask[0] = False
    return _cut(example, kept_ids, kept_mask, max_length, CUT_BEFORE_THE_ANSWER, EARLIER_ANSWERS_CUT)


def _begin_of_last_answer(mask: MaskArray) -> int:
    """Return where the last run of labels begins."""
    last = int(np.flatnonzero(mask)[-1])
    before = np.flatnonzero(~mask[:last])
    return int(before[-1]) + 1 if len(before) else 0


def _split(example: Example, max_length: int) -> list[Example]:
    """Cut so that the last token of a piece is the first of the next: that token is a label in one of them."""
    pieces = []
    for begin in range(0, len(example.input_ids) - 1, max_length - 1):
        mask = example.loss_mask[begin : begin + max_length].copy()
        mask[0] = False
        if mask.any():
            pieces.append(_noted(example, example.input_ids[begin : begin + max_length], mask, SPLIT))
    if not pieces:
        raise UnusableRowError(f"no trained token in any piece of data.max_length ({max_length} tokens)")
    # whoever generates asks once for a row, not once for a piece
    return [pieces[0], *(dataclasses.replace(piece, prompt=None, answer=None, warnings=()) for piece in pieces[1:])]


def _cut(
    example: Example, ids: TokenArray, mask: MaskArray, max_length: int, note: str, note_on_labels: str
) -> Example:
    """Return the row with the tokens that a cut leaves, noting whether labels are lost with the others."""
    num_labels = int(np.count_nonzero(mask))
    if not num_labels:
        raise UnusableRowError(f"no trained token after the cut to data.max_length ({max_length} tokens)")
    warnings = (note, note_on_labels) if num_labels < np.count_nonzero(example.loss_mask) else (note,)
    return _noted(example, ids, mask, *warnings)


def _noted(example: Example, ids: TokenArray, mask: MaskArray, *warnings: str) -> Example:
    return Example(example.where, ids, mask, example.prompt, example.answer, (*example.warnings, *warnings))
