"""Examples -> batches: the data set that a loader reads, the collators, and the order of an epoch as a pure function."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from qlora_train.data.types import Example
from qlora_train.objectives.sft_loss import IGNORE_INDEX

MEGABATCH_BATCHES = 50
"""Batches whose rows are sorted together by `group_by_length`: wide enough to match lengths, narrow enough to mix."""

NumberedExample = tuple[int, Example]
"""A row and its number, by which a trainer can name the rows of a batch."""
Batch = dict[str, torch.Tensor]


class NumberedRows(Protocol):
    """Rows that are read when they are asked for by number."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, number: int, /) -> Example:
        """Return one row."""


class RowDataset(Dataset[list[NumberedExample]]):
    """The rows of a run as a loader takes them: those of a micro-batch at a time."""

    def __init__(self, rows: NumberedRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, numbers: Sequence[int]) -> list[NumberedExample]:
        """Return rows."""
        return [(number, self._rows[number]) for number in numbers]


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows on the right to one length, a multiple of `multiple_of` tokens (see `padding_multiple`).

    Returns int64 tensors: `input_ids`, `attention_mask` (1 for a token, 0 for padding) and `labels` of shape
    (batch, seq), and `row` of shape (batch,). Labels come from the mask, never from token ids: a pad token that is also
    the eos token still carries loss where it ends an answer.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, rows: Sequence[NumberedExample]) -> Batch:
        """Pad `rows` into one batch."""
        longest = max(len(example.input_ids) for _, example in rows)
        shape = (len(rows), -(-longest // self.multiple_of) * self.multiple_of)
        input_ids, present = np.full(shape, self.pad_token_id, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        for place, (_, example) in enumerate(rows):
            length = len(example.input_ids)
            input_ids[place, :length], present[place, :length] = example.input_ids, 1
            labels[place, :length] = labels_of(example)
        return _tensors(rows, input_ids=input_ids, attention_mask=present, labels=labels)


FEWEST_SHARED = 4
"""Tokens that two rows begin with before it is worth to name them: most rows begin with the same one or two."""


@dataclass(frozen=True, slots=True)
class PackCollator:
    """Lays rows end to end as documents of one row, the longest first.

    Returns int64 tensors: `input_ids`, `labels` and `position_ids` of shape (1, seq), and `row` of shape
    (num_documents,). Positions jump where a document begins, and begin at 0.

    With `shares`, what documents begin with alike stands in the row once: one whose positions begin at p > 0 has the first
    p tokens of the last document whose positions begin at 0. Every token that predicts a label of it is its own.

    The row is padded to a multiple of `multiple_of` tokens by further documents without labels.
    """

    pad_token_id: int = 0
    multiple_of: int = 1
    shares: bool = False

    def __call__(self, rows: Sequence[NumberedExample]) -> Batch:
        """Join `rows`, those of one pack or of several."""
        placed = [(row, 0) for row in sorted(rows, key=lambda row: -len(row[1].input_ids))]
        assert not any(example.loss_mask[0] for _, example in rows), "nothing predicts the first token of a document"
        if self.shares:
            placed = _by_prefix([row for row, _ in placed])
        documents = [
            (example.input_ids[begin:], labels_of(example)[begin:], np.arange(begin, len(example.input_ids)))
            for (_, example), begin in placed
        ]
        missing = -sum(len(tokens) for tokens, _, _ in documents) % self.multiple_of
        while missing:
            length = min(missing, len(documents[0][0]))
            documents.append((np.full(length, self.pad_token_id), np.full(length, IGNORE_INDEX), np.arange(length)))
            missing -= length
        input_ids, labels, position_ids = (
            np.concatenate(parts, dtype=np.int64)[None] for parts in zip(*documents, strict=True)
        )
        return _tensors([row for row, _ in placed], input_ids=input_ids, labels=labels, position_ids=position_ids)


def _by_prefix(rows: Sequence[NumberedExample]) -> list[tuple[NumberedExample, int]]:
    """Return rows, the longest first, each with the number of tokens that it has from the last one that has none.

    A row joins the one before it with which it shares most, if that is worth it.
    """
    families: list[list[tuple[NumberedExample, int]]] = []
    for row in rows:
        shared = [num_shared(row[1], family[0][0][1]) for family in families]
        most = max(shared, default=0)
        if most >= FEWEST_SHARED:
            families[shared.index(most)].append((row, most))
        else:
            families.append([(row, 0)])
    return [member for family in families for member in family]


def num_shared(row: Example, other: Example) -> int:
    """Return how many tokens `row` need not have itself because `other` begins with them.

    At least one token in front of its first label is its own, which predicts that label.
    """
    first_label = int(np.argmax(row.loss_mask)) if row.loss_mask.any() else len(row.input_ids)
    most = max(0, min(first_label - 1, len(other.input_ids)))
    differs = row.input_ids[:most] != other.input_ids[:most]
    return int(np.argmax(differs)) if differs.any() else most


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that a micro-batch holds: tokens, and those of them that are labels."""

    num_tokens: int
    num_labels: int


@dataclass(frozen=True, slots=True)
class StepCollator:
    """Makes the micro-batches of an optimizer step of its rows.

    Attributes:
        collate: makes one.
        most: lets micro-batches be filled: rows are put together anew, as many as a micro-batch holds. None: they stay in
            the micro-batches that they come in.
    """

    collate: Collator | PackCollator
    most: Capacity | None = None

    def __call__(self, micro_batches: Sequence[Sequence[NumberedExample]]) -> list[Batch]:
        """Return the micro-batches of a step."""
        return [self.collate(rows) for rows in self.grouped(micro_batches)]

    def grouped(self, micro_batches: Sequence[Sequence[NumberedExample]]) -> Sequence[Sequence[NumberedExample]]:
        """Return the rows of a step as they are computed together."""
        if self.most is None:
            return micro_batches
        filled = _filled([row for rows in micro_batches for row in rows], self.most)
        return filled if len(filled) < len(micro_batches) else micro_batches


def _filled(rows: Sequence[NumberedExample], most: Capacity) -> list[list[NumberedExample]]:
    """Return rows in as few groups as first-fit decreasing finds, none of which holds more than the most."""
    groups: list[list[NumberedExample]] = []
    left: list[Capacity] = []
    for row in sorted(rows, key=lambda row: -len(row[1].input_ids)):
        num_tokens, num_labels = len(row[1].input_ids), int(np.count_nonzero(row[1].loss_mask))
        fits = (each.num_tokens >= num_tokens and each.num_labels >= num_labels for each in left)
        place = next((place for place, fit in enumerate(fits) if fit), len(groups))
        if place == len(groups):
            groups.append([])
            left.append(most)
        groups[place].append(row)
        left[place] = Capacity(left[place].num_tokens - num_tokens, left[place].num_labels - num_labels)
    return groups


def labels_of(example: Example) -> npt.NDArray[np.int32]:
    """Return a row's labels, (seq,): its tokens, IGNORED where the mask is false."""
    return np.where(example.loss_mask, example.input_ids, np.int32(IGNORE_INDEX))


def _tensors(rows: Sequence[NumberedExample], **arrays: npt.NDArray[np.int64]) -> Batch:
    numbers = torch.tensor([int(number) for number, _ in rows], dtype=torch.long)
    return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, "row": numbers}


def padding_multiple(device: torch.device) -> int:
    """Return the number of tokens whose multiples batches are padded to on a device.

    Tensor cores work on tiles of 8 16-bit numbers: a length that 8 does not divide sends whole matrix products to slower
    kernels (NVIDIA, Matrix Multiplication Background User's Guide, "Requirements to Use Tensor Cores"). A CPU's products
    make a kernel for every new length of a batch, which takes time and memory (oneDNN, Primitive Cache).
    """
    return 8 if device.type == "cuda" else 4


def row_multiple(device: torch.device) -> int:
    """Return the same for a row that many rows are laid into, which has more tokens and as many lengths."""
    return 8 if device.type == "cuda" else 32


class BatchOrder(Protocol):
    """Micro-batches of every epoch, as lists of row numbers; an epoch's depend on nothing but its number."""

    def __len__(self) -> int:
        """Return the micro-batches of an epoch: as many in each."""

    def of_epoch(self, epoch: int) -> Iterator[list[int]]:
        """Yield those of an epoch, counted from 0."""


@dataclass(frozen=True, slots=True, eq=False)
class RowOrder:
    """Micro-batches of `batch_size` rows in the order of `epoch_order`; the last of an epoch may have fewer.

    `grouped_rows` is how many rows `group_by_length` keeps together: a multiple of `batch_size`, which gives the order of
    batches of that size, cut smaller.
    """

    lengths: npt.NDArray[np.int32]
    seed: int
    batch_size: int
    group_by_length: bool
    grouped_rows: int

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def of_epoch(self, epoch: int) -> Iterator[list[int]]:
        """Yield the micro-batches of an epoch."""
        order = epoch_order(
            self.lengths,
            seed=self.seed,
            epoch=epoch,
            batch_size=self.grouped_rows,
            group_by_length=self.group_by_length,
        )
        for begin in range(0, len(order), self.batch_size):
            yield order[begin : begin + self.batch_size].tolist()


def epoch_order(
    lengths: npt.NDArray[np.int32], *, seed: int, epoch: int, batch_size: int, group_by_length: bool
) -> npt.NDArray[np.int64]:
    """Return the order of the rows in one epoch: a permutation that depends on nothing but the arguments.

    With `group_by_length`, shuffled rows are cut into megabatches of MEGABATCH_BATCHES batches and sorted by length
    within each; then the whole batches are shuffled. A last batch that is not full stays last, so that every batch that
    a loader cuts from the order holds rows of similar length.

    Args:
        lengths: tokens of each row, (num_rows,).
        seed: `run.seed`.
        epoch: from 0; every epoch has an order of its own.
        batch_size: rows of the batches that the loader will cut.
        group_by_length: batch rows of similar length.

    Returns:
        Row numbers, int64 (num_rows,).
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: npt.NDArray[np.int64] = torch.randperm(len(lengths), generator=generator).numpy()
    if not group_by_length:
        return order
    width = batch_size * MEGABATCH_BATCHES
    for begin in range(0, len(order), width):
        megabatch = order[begin : begin + width]
        order[begin : begin + width] = megabatch[np.argsort(-lengths[megabatch], kind="stable")]
    num_full = len(lengths) // batch_size
    full, rest = order[: num_full * batch_size].reshape(num_full, batch_size), order[num_full * batch_size :]
    return np.concatenate([full[torch.randperm(num_full, generator=generator).numpy()].ravel(), rest])


def labelled_batches(
    examples: Sequence[Example], order: npt.NDArray[np.int64], collate: Collator, *, min_labels: int, max_batches: int
) -> list[Batch]:
    """Return batches of as many rows, in this order, as it takes to hold `min_labels` labels each.

    Rows at the end that do not fill a batch are left out, unless there would be no batch at all.
    """
    batches: list[Batch] = []
    rows: list[NumberedExample] = []
    num_labels = 0
    for number in order:
        if len(batches) == max_batches:
            break
        rows.append((int(number), examples[int(number)]))
        num_labels += int(np.count_nonzero(rows[-1][1].loss_mask))
        if num_labels >= min_labels:
            batches.append(collate(rows))
            rows, num_labels = [], 0
    return batches or [collate(rows)]
