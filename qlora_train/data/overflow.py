"""`data.overflow`: rows longer than `data.max_length` are dropped, refused, cut or split."""

import dataclasses
from typing import Literal

import numpy as np

from qlora_train.data.types import Example, MaskArray, TokenArray, UnusableRowError
from qlora_train.utils.errors import DataError

Overflow = Literal["drop", "refuse", "truncate", "keep_end", "keep_answer", "split"]


def apply_overflow(example: Example, *, max_length: int, overflow: Overflow, bos: int | None) -> list[Example]:
    """Return a row in parts of at most `max_length` tokens, each with a label: the row itself if it is short enough.

    The first token of a part is no label, since nothing predicts it. Only the first part has the row's prompt, answer and
    warnings.

    Args:
        example: a row with a label.
        max_length: tokens.
        overflow: `drop`, `refuse`, `truncate` (cut the end), `keep_end` (cut the beginning), `keep_answer` (keep the last
            answer, what fits before it, and the beginning token) or `split` (into parts that share a token).
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
    ids, mask = example.input_ids, example.loss_mask
    if overflow == "truncate":
        return [_cut(example, ids[:max_length], mask[:max_length], max_length, "cut at the end")]
    if overflow == "keep_end":
        return [_cut(example, ids[-max_length:], mask[-max_length:], max_length, "cut at the beginning")]
    return [_keep_answer(example, max_length, bos)]


def _keep_answer(example: Example, max_length: int, bos: int | None) -> Example:
    last = int(np.flatnonzero(example.loss_mask)[-1])
    ids, mask = (
        example.input_ids[: last + 1],
        example.loss_mask[: last + 1],
    )  # nothing behind the last answer is trained
    before = np.flatnonzero(~mask)
    begin_of_answer = int(before[-1]) + 1 if len(before) else 0
    if len(ids) - begin_of_answer > max_length - 1:  # at least one token must precede it
        raise UnusableRowError(f"the last answer alone is longer than data.max_length ({max_length} tokens)")
    num_bos = int(bos is not None and ids[0] == bos)
    num_last = min(max_length, len(ids)) - num_bos
    ids, mask = (np.concatenate([array[:num_bos], array[-num_last:]]) for array in (ids, mask))
    return _cut(example, ids, mask, max_length, "cut before the last answer", "earlier answers are cut")


def _split(example: Example, max_length: int) -> list[Example]:
    """Split so that the last token of a part is the first of the next: that token is a label in one of them."""
    parts = []
    for begin in range(0, len(example.input_ids) - 1, max_length - 1):
        mask = example.loss_mask[begin : begin + max_length].copy()
        mask[0] = False
        if mask.any():
            ids = example.input_ids[begin : begin + max_length]
            parts.append(dataclasses.replace(example, input_ids=ids, loss_mask=mask))
    if not parts:
        raise UnusableRowError(f"no trained token in any piece of data.max_length ({max_length} tokens)")
    warnings = (*example.warnings, "split into pieces of data.max_length")
    others = (dataclasses.replace(part, prompt=None, answer=None, warnings=()) for part in parts[1:])
    return [dataclasses.replace(parts[0], warnings=warnings), *others]


def _cut(
    example: Example,
    ids: TokenArray,
    mask: MaskArray,
    max_length: int,
    cut: str,
    lost_labels: str = "the answer is cut",
) -> Example:
    """Return the row with the remaining tokens, and warnings about the cut and about lost labels."""
    mask = mask.copy()
    mask[0] = False
    num_labels = int(np.count_nonzero(mask))
    if not num_labels:
        raise UnusableRowError(f"no trained token after the cut to data.max_length ({max_length} tokens)")
    warnings = (*example.warnings, f"{cut} to data.max_length")
    if num_labels < np.count_nonzero(example.loss_mask):
        warnings += (lost_labels,)
    return dataclasses.replace(example, input_ids=ids, loss_mask=mask, warnings=warnings)
