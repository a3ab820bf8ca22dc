"""Worst-case batches of a run, made from its own rows: no real batch has more tokens, labels or documents.

Memory grows with a micro-batch's tokens, padding included, and its labels. The longest rows need not have the most labels:
the worst case combines the maxima of both.

The backward pass of varlen attention also allocates 128 float32 rows of queries per document (FlashAttention-2's
`dq_accum`), so that flattened batches have a second worst case: the same tokens in as many documents as possible.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_train.config import RunConfig
from qlora_train.config.objectives import OBJECTIVES
from qlora_train.data.collate import Batch, TokenBudget
from qlora_train.data.packing import PackOrder
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example
from qlora_train.training.batch_source import BatchSource, RowBatches, StreamBatches


class MicroBatchSize(NamedTuple):
    """Tokens of each document, labels in total, and the most documents that a micro-batch of so many tokens has."""

    lengths: Sequence[int]
    num_labels: int
    max_documents: int


def worst_case_batches(source: BatchSource, config: RunConfig) -> list[Batch]:
    """Return a micro-batch with the most tokens and labels, then one with the most documents if those are more."""
    if isinstance(source, StreamBatches):
        row, size = source.stream.head()[0], _stream_size(source, config)
    else:
        row, size = source.rows[int(np.argmax(source.rows.lengths))], _largest_size(source, config)
    batches = [_documents(row, size.lengths, size.num_labels)]
    if size.max_documents > len(size.lengths):
        length, rest = divmod(sum(size.lengths), size.max_documents)
        even = [length + (index < rest) for index in range(size.max_documents)]
        batches.append(_documents(row, even, size.num_labels))
    if isinstance(source, RowBatches) and OBJECTIVES[config.train.objective].estimates_kl:
        batches = [_with_mismatched(batch, source, config) for batch in batches]
    return [source.collate_unshared(batch) for batch in batches]


def token_budget(rows: Rows, config: RunConfig, *, chunked_loss: bool, min_tokens: int = 0) -> TokenBudget:
    """Return the token budget of padding-free micro-batches: the tokens of the largest padded one.

    Args:
        chunked_loss: labels hardly cost memory, so that their number is bounded by that of a step; otherwise it is that of
            the largest padded micro-batch.
        min_tokens: lower bound, limited to the tokens of a step; needs `chunked_loss`.
    """
    largest = _padded_size(rows, config)
    num_tokens = sum(largest.lengths)
    if not chunked_loss:
        return TokenBudget(num_tokens, largest.num_labels)
    rows_per_step = _rows_per_step(config)
    num_tokens = max(num_tokens, min(min_tokens, _sum_of_largest(rows.lengths, rows_per_step)))
    return TokenBudget(num_tokens, min(_sum_of_largest(rows.num_labels, rows_per_step), _max_labels(rows, num_tokens)))


def _stream_size(source: StreamBatches, config: RunConfig) -> MicroBatchSize:
    """Return full rows with the largest share of labels among the first: those to come are unknown."""
    share = max(np.count_nonzero(row.loss_mask) / len(row.input_ids) for row in source.stream.head())
    num_rows, length = config.train.per_device_train_batch_size, config.data.max_length
    return MicroBatchSize([length] * num_rows, num_rows * math.ceil(share * length), num_rows)


def _largest_size(source: RowBatches, config: RunConfig) -> MicroBatchSize:
    if isinstance(source.order, PackOrder):
        return _packed_size(source.rows, source.order, config.train.per_device_train_batch_size)
    budget = source.collate.budget
    if budget is None:
        return _padded_size(source.rows, config)
    longest = int(source.rows.lengths.max())
    lengths = [min(longest, budget.max_tokens - start) for start in range(0, budget.max_tokens, longest)]
    shortest = np.sort(source.rows.lengths)[: _rows_per_step(config)]
    max_documents = int(np.searchsorted(np.cumsum(shortest, dtype=np.int64), budget.max_tokens, side="right"))
    return MicroBatchSize(lengths, budget.max_labels, max_documents)


def _padded_size(rows: Rows, config: RunConfig) -> MicroBatchSize:
    num_rows = min(config.train.per_device_train_batch_size, len(rows))
    lengths = [int(rows.padded_lengths.max())] * num_rows
    return MicroBatchSize(lengths, _sum_of_largest(rows.num_labels, num_rows), num_rows)


def _packed_size(rows: Rows, order: PackOrder, num_packs: int) -> MicroBatchSize:
    """Return the fullest packs. Every epoch has the same lengths in a pack, and any row of a length."""
    indices, starts = order.packs(0)
    lengths = rows.lengths[indices].astype(np.int64)
    most_labels = np.zeros(lengths.max() + 1, np.int64)  # by length
    np.maximum.at(most_labels, rows.lengths, rows.num_labels)
    num_labels = np.add.reduceat(most_labels[lengths], starts[:-1])
    fullest = np.argsort(-np.add.reduceat(lengths, starts[:-1]), kind="stable")[:num_packs]
    documents = [int(length) for pack in fullest for length in lengths[starts[pack] : starts[pack + 1]]]
    max_labels, max_documents = (_sum_of_largest(counts, num_packs) for counts in (num_labels, np.diff(starts)))
    return MicroBatchSize(documents, max_labels, max_documents)


def _rows_per_step(config: RunConfig) -> int:
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps


def _max_labels(rows: Rows, num_tokens: int) -> int:
    """Return an upper bound of the labels among so many tokens: those of the rows with the largest share of labels."""
    order = np.argsort(-rows.num_labels / rows.lengths, kind="stable")
    tokens, labels = (np.cumsum(sizes[order], dtype=np.int64) for sizes in (rows.lengths, rows.num_labels))
    return int(labels[min(int(np.searchsorted(tokens, num_tokens)), len(order) - 1)])


def _sum_of_largest(sizes: npt.NDArray[np.int64], count: int) -> int:
    return int(np.sort(sizes)[::-1][:count].sum())


def _with_mismatched(documents: Sequence[Example], source: RowBatches, config: RunConfig) -> list[Example]:
    """Return documents with mismatched sequences, which may be longer than the rows that they are made of."""
    longest = min(source.rows.max_mismatched_length, config.data.max_length)
    num_rows = min(config.train.per_device_train_batch_size, len(source.rows))
    if num_rows * longest <= sum(document.num_tokens for document in documents):
        return [document.with_mismatched(document) for document in documents]
    others = _documents(documents[0], [longest] * num_rows, num_rows * int(source.rows.num_labels.max()))
    return [*(one.with_mismatched(other) for one, other in zip(documents, others, strict=False)), *documents[num_rows:]]


def _documents(row: Example, lengths: Sequence[int], num_labels: int) -> list[Example]:
    """Return documents that repeat a row's tokens, with `num_labels` labels in total, or as many as fit.

    The tokens of a preference pair are divided evenly between its sequences.
    """
    documents = []
    for length in lengths:
        tokens = np.resize(row.input_ids, max(length, len(row.sequences)))  # what is left of a budget may be 1 token
        parts = np.array_split(tokens, len(row.sequences))
        sequences = []
        for part in parts:
            count = max(0, min(num_labels, len(part) - 1))  # nothing predicts the first token
            num_labels -= count
            mask = np.arange(len(part)) >= len(part) - count
            sequences.append(replace(row, input_ids=part, loss_mask=mask, rejected=None))
        documents.append(replace(sequences[0], rejected=sequences[1] if sequences[1:] else None))
    return documents
