"""Examples -> batches: the data set that a `DataLoader` reads, and the collators that pad or flatten its rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from qlora_train.data.mismatched_rows import MISMATCHED, mismatched_sequence
from qlora_train.data.types import Example
from qlora_train.utils.constants import IGNORE_INDEX

IndexedExample = tuple[int, Example]
"""A row and its index, by which the trainer names the rows of a batch."""
Batch = dict[str, torch.Tensor]

MIN_SHARED_PREFIX = 4
"""Tokens from which on sharing a prefix pays: most rows begin with the same one or two."""


class RowDataset(Dataset[list[IndexedExample]]):
    """The rows of a run; an item is a micro-batch of them."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: Sequence[int]) -> list[IndexedExample]:
        return [(index, self._rows[index]) for index in indices]


class MismatchedRowDataset(Dataset[list[IndexedExample]]):
    """The rows of a run; an item is a micro-batch of them, given as pairs of `other_rows`."""

    def __init__(self, rows: Sequence[Example], max_length: int) -> None:
        self._rows, self._max_length = rows, max_length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, pairs: Sequence[tuple[int, int]]) -> list[IndexedExample]:
        return [(index, self._row(index, other)) for index, other in pairs]

    def _row(self, index: int, other: int) -> Example:
        row = self._rows[index]
        return row.with_mismatched(mismatched_sequence(row, self._rows[other], self._max_length))


@dataclass(frozen=True, slots=True)
class PaddingCollator:
    """Pads rows on the right to one length, a multiple of `pad_to_multiple_of` tokens (see `padding_multiple`).

    Returns int64 tensors: `input_ids`, `attention_mask` (1 for a token, 0 for padding) and `labels` of shape
    (batch, seq), and `row`, the rows' indices, of shape (batch,).
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[IndexedExample]) -> Batch:
        longest = max(len(example.input_ids) for _, example in rows)
        shape = (len(rows), -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of)
        input_ids, attention_mask = np.full(shape, self.pad_token_id, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        for index, (_, example) in enumerate(rows):
            length = len(example.input_ids)
            input_ids[index, :length], attention_mask[index, :length] = example.input_ids, 1
            labels[index, :length] = labels_of(example)
        return _tensors(rows, input_ids=input_ids, attention_mask=attention_mask, labels=labels)


@dataclass(frozen=True, slots=True)
class FlatteningCollator:
    """Flattens rows, the longest first, into one sequence of documents without padding.

    Returns int64 tensors: `input_ids`, `labels` and `position_ids` of shape (1, seq), and `row`, the rows' indices, of
    shape (num_documents,). `position_ids` restart where a document begins.

    With `share_prefixes`, the sequence holds a prefix that documents have in common once: a document whose positions
    begin at p > 0 continues the first p tokens of the last document whose positions begin at 0. Every token that
    predicts a label of a document is that document's own.

    Documents without labels pad the sequence to a multiple of `pad_to_multiple_of` tokens.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int = 1
    share_prefixes: bool = False

    def __call__(self, rows: Sequence[IndexedExample]) -> Batch:
        assert not any(example.loss_mask[0] for _, example in rows), "nothing predicts the first token of a document"
        placed = [(row, 0) for row in sorted(rows, key=lambda row: -len(row[1].input_ids))]
        if self.share_prefixes:
            placed = _grouped_by_prefix([row for row, _ in placed])
        documents = [
            (example.input_ids[begin:], labels_of(example)[begin:], np.arange(begin, len(example.input_ids)))
            for (_, example), begin in placed
        ]
        missing = -sum(len(tokens) for tokens, _, _ in documents) % self.pad_to_multiple_of
        while missing:
            length = min(missing, len(documents[0][0]))
            documents.append((np.full(length, self.pad_token_id), np.full(length, IGNORE_INDEX), np.arange(length)))
            missing -= length
        input_ids, labels, position_ids = (
            np.concatenate(parts, dtype=np.int64)[None] for parts in zip(*documents, strict=True)
        )
        return _tensors([row for row, _ in placed], input_ids=input_ids, labels=labels, position_ids=position_ids)


def _grouped_by_prefix(rows: Sequence[IndexedExample]) -> list[tuple[IndexedExample, int]]:
    """Return rows, given longest first, each with the length of the prefix it shares with the last row that shares none."""
    groups: list[list[tuple[IndexedExample, int]]] = []
    for row in rows:
        shared = [shared_prefix_length(row[1], group[0][0][1]) for group in groups]
        longest = max(shared, default=0)
        if longest >= MIN_SHARED_PREFIX:
            groups[shared.index(longest)].append((row, longest))
        else:
            groups.append([(row, 0)])
    return [member for group in groups for member in group]


def shared_prefix_length(row: Example, other: Example) -> int:
    """Return how many tokens of `row` the beginning of `other` can replace.

    The token before the first label stays the row's own: it predicts that label.
    """
    first_label = int(np.argmax(row.loss_mask)) if row.loss_mask.any() else len(row.input_ids)
    limit = max(0, min(first_label - 1, len(other.input_ids)))
    differs = row.input_ids[:limit] != other.input_ids[:limit]
    return int(np.argmax(differs)) if differs.any() else limit


def collate_rows(collate: "PaddingCollator | FlatteningCollator", rows: Sequence[IndexedExample]) -> Batch:
    """Return rows as a batch; the sequences of preference pairs are rows of it. Unpaired preferences: `_collate_unpaired`.

    Batches of pairs also have `sequence`, 0 for the chosen and 1 for the rejected sequence of each `row`, and `num_labels`,
    the labels of each sequence in the order of the batch's labels; both (num_sequences,). Rows with a `reference_logp` give
    `reference_logps`, float32 (num_sequences,), in the same order.
    """
    if rows[0][1].desirable is not None:
        return _collate_unpaired(collate, rows)
    if rows[0][1].rejected is None:
        return collate(rows)
    sequences = [each for index, row in rows for each in enumerate(row.sequences, 2 * index)]
    batch = collate(sequences)
    numbers, by_number = batch["row"], dict(sequences)
    in_order = [by_number[number] for number in numbers.tolist()]
    counts = torch.tensor([int(np.count_nonzero(sequence.loss_mask)) for sequence in in_order])
    return {
        **batch, "row": numbers // 2, "sequence": numbers % 2, "num_labels": counts, **_reference_logps(in_order),
    }  # fmt: skip


def _collate_unpaired(collate: "PaddingCollator | FlatteningCollator", rows: Sequence[IndexedExample]) -> Batch:
    """Return unpaired preferences as a batch with `desirable`, bool (num_rows,), in the order of `row`, and `num_labels`.

    Mismatched sequences are a batch of their own, with MISMATCHED before the names of its tensors.
    """
    batch = _with_num_labels(collate, rows)
    by_index = dict(rows)
    batch["desirable"] = torch.tensor([bool(by_index[index].desirable) for index in batch["row"].tolist()])
    others = [(index, row.mismatched) for index, row in rows if row.mismatched is not None]
    if others:
        batch |= {MISMATCHED + name: tensor for name, tensor in _with_num_labels(collate, others).items()}
    return batch


def _with_num_labels(collate: "PaddingCollator | FlatteningCollator", rows: Sequence[IndexedExample]) -> Batch:
    batch, by_index = collate(rows), dict(rows)
    in_order = [by_index[index] for index in batch["row"].tolist()]
    counts = torch.tensor([row.num_labels for row in in_order])
    return {**batch, "num_labels": counts, **_reference_logps(in_order)}


def _reference_logps(sequences: Sequence[Example]) -> Batch:
    """Return the log-probabilities under the reference model as a batch's `reference_logps`; nothing without them."""
    values = [sequence.reference_logp for sequence in sequences]
    if None in values:
        assert not any(value is not None for value in values), "rows with and without reference log-probabilities"
        return {}
    return {"reference_logps": torch.tensor(values, dtype=torch.float32)}


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """The most tokens that a micro-batch holds, and the most labels among them."""

    max_tokens: int
    max_labels: int


@dataclass(frozen=True, slots=True)
class StepCollator:
    """Collates the micro-batches of one optimizer step.

    With a `budget`, the rows of the step are regrouped into fewer micro-batches that it allows.
    """

    collate: PaddingCollator | FlatteningCollator
    budget: TokenBudget | None = None

    def __call__(self, micro_batches: Sequence[Sequence[IndexedExample]]) -> list[Batch]:
        return [collate_rows(self.collate, rows) for rows in self.grouped(micro_batches)]

    def grouped(self, micro_batches: Sequence[Sequence[IndexedExample]]) -> Sequence[Sequence[IndexedExample]]:
        """Return the rows of each micro-batch that is computed."""
        if self.budget is None:
            return micro_batches
        filled = _first_fit_decreasing([row for rows in micro_batches for row in rows], self.budget)
        return filled if len(filled) < len(micro_batches) else micro_batches


def _first_fit_decreasing(rows: Sequence[IndexedExample], budget: TokenBudget) -> list[list[IndexedExample]]:
    groups: list[list[IndexedExample]] = []
    free: list[TokenBudget] = []
    for row in sorted(rows, key=lambda row: -row[1].num_tokens):
        passes = [each for each in (row[1], row[1].mismatched) if each is not None]
        num_tokens, num_labels = max(each.num_tokens for each in passes), max(each.num_labels for each in passes)
        fits = (each.max_tokens >= num_tokens and each.max_labels >= num_labels for each in free)
        index = next((index for index, fit in enumerate(fits) if fit), len(groups))
        if index == len(groups):
            groups.append([])
            free.append(budget)
        groups[index].append(row)
        free[index] = TokenBudget(free[index].max_tokens - num_tokens, free[index].max_labels - num_labels)
    return groups


def labels_of(example: Example) -> npt.NDArray[np.int32]:
    """Return the labels of a row, (seq,): its tokens, IGNORE_INDEX where `loss_mask` is false."""
    # by the mask, never by token ids: a pad token that is also the eos token has loss at the end of an answer
    return np.where(example.loss_mask, example.input_ids, np.int32(IGNORE_INDEX))


def _tensors(rows: Sequence[IndexedExample], **arrays: npt.NDArray[np.int64]) -> Batch:
    indices = torch.tensor([int(index) for index, _ in rows], dtype=torch.long)
    return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, "row": indices}


def padding_multiple(device: torch.device) -> int:
    """Return the `pad_to_multiple_of` for padded batches on a device.

    Tensor cores compute tiles of 8 16-bit numbers: a length that 8 does not divide sends whole matrix products to slower
    kernels (NVIDIA, Matrix Multiplication Background User's Guide, "Requirements to Use Tensor Cores"). On a CPU, oneDNN
    compiles a kernel for every new length, which costs time and memory (oneDNN, Primitive Cache).
    """
    return 8 if device.type == "cuda" else 4


def flattened_multiple(device: torch.device) -> int:
    """Return the `pad_to_multiple_of` for flattened batches, which have more tokens and so more different lengths."""
    return 8 if device.type == "cuda" else 32


def batches_with_labels(
    examples: Sequence[Example], order: Sequence[int] | npt.NDArray[np.int64], collate: PaddingCollator,
    *, min_labels: int, max_batches: int,
) -> list[Batch]:  # fmt: skip
    """Return batches of as many rows, in this order, as it takes to hold `min_labels` labels each.

    Rows at the end that do not fill a batch are left out, unless there would be no batch at all.
    """
    batches: list[Batch] = []
    rows: list[IndexedExample] = []
    num_labels = 0
    for index in order:
        if len(batches) == max_batches:
            break
        rows.append((int(index), examples[int(index)]))
        num_labels += int(np.count_nonzero(rows[-1][1].loss_mask))
        if num_labels >= min_labels:
            batches.append(collate(rows))
            rows, num_labels = [], 0
    return batches or [collate(rows)]
