"""Worst-case batches of a run, made from its own rows: no real batch has more tokens or more labels.

Memory grows with a micro-batch's tokens, padding included, and its labels. The longest rows need not have the most labels:
the worst case combines the maxima of both.

The backward pass of varlen attention also allocates 128 float32 rows of queries per document (FlashAttention-2's
`dq_accum`), so that flattened batches have a second worst case: the same tokens in as many documents as possible.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.data.collate import Batch, FlatteningCollator, TokenBudget
from qlora_train.data.packing import PackOrder
from qlora_train.data.streaming import RowStream
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example
from qlora_train.training.batch_source import BatchSource, RowBatches

NUM_EPOCHS = 8
"""Epochs whose packs are examined: rows of equal length swap packs between epochs, and their labels with them."""


def worst_case_batches(data: PreparedData, config: RunConfig, source: BatchSource) -> list[Batch]:
    """Return a micro-batch with the most tokens and labels, then one with the most documents if those are more."""
    rows = worst_case_rows(data, config)
    if not isinstance(source, RowBatches) or not isinstance(source.collate.collate, FlatteningCollator):
        return [source.collate_unshared(rows)]
    budget = source.collate.budget
    if budget is not None:
        rows = _repeat_to_budget(rows[0], budget)
    num_documents = _max_documents(source.rows, config, budget)
    batches = [rows] if num_documents <= len(rows) else [rows, _split_into_documents(rows, num_documents)]
    return [source.collate_unshared(batch) for batch in batches]


def worst_case_rows(data: PreparedData, config: RunConfig) -> list[Example]:
    """Return the rows of the largest micro-batch of the settings.

    The rows of a stream are unknown: they get `data.max_length` tokens, and the largest share of labels in its first rows.
    """
    num_rows = config.train.per_device_train_batch_size
    if isinstance(data.train, RowStream):
        return _stream_rows(data.train, config, num_rows)
    return _fullest_packs(data.train, config, num_rows) if config.data.packing else _padded_rows(data.train, num_rows)


def token_budget(rows: Rows, config: RunConfig, *, chunked_loss: bool, min_tokens: int = 0) -> TokenBudget:
    """Return the token budget of padding-free micro-batches: the tokens of the largest padded one.

    Args:
        rows: the training rows.
        config: the run's settings.
        chunked_loss: labels hardly cost memory, so that their number is bounded by that of a step; otherwise it is that of
            the largest padded micro-batch.
        min_tokens: lower bound, limited to the tokens of a step; needs `chunked_loss`.
    """
    num_rows = config.train.per_device_train_batch_size
    largest = _padded_rows(rows, num_rows)
    num_tokens = sum(len(row.input_ids) for row in largest)
    if not chunked_loss:
        return TokenBudget(num_tokens, _num_labels(largest))
    rows_per_step = num_rows * config.train.gradient_accumulation_steps
    num_tokens = max(num_tokens, min(min_tokens, _sum_of_largest(rows.lengths, rows_per_step)))
    return TokenBudget(num_tokens, min(_sum_of_largest(rows.num_labels, rows_per_step), _max_labels(rows, num_tokens)))


def _repeat_to_budget(row: Example, budget: TokenBudget) -> list[Example]:
    tokens, size = np.resize(row.input_ids, budget.max_tokens), len(row.input_ids)
    parts = [tokens[start : start + size] for start in range(0, budget.max_tokens, size)]
    return with_labels([replace(row, input_ids=part) for part in parts], budget.max_labels)


def _max_documents(rows: Rows, config: RunConfig, budget: TokenBudget | None) -> int:
    """Return the most documents in a flattened micro-batch; without a budget it has those of the settings."""
    num_rows = config.train.per_device_train_batch_size
    if config.data.packing:
        packs = PackOrder(rows.lengths, max_length=config.data.max_length, seed=config.run.seed, batch_size=num_rows)
        return _sum_of_largest(np.diff(packs.packs(0)[1]), num_rows)
    if budget is None:
        return num_rows
    shortest = np.sort(rows.lengths)[: num_rows * config.train.gradient_accumulation_steps]
    return int(np.searchsorted(np.cumsum(shortest, dtype=np.int64), budget.max_tokens, side="right"))


def _split_into_documents(rows: Sequence[Example], num_documents: int) -> list[Example]:
    """Return the same number of tokens and labels in `num_documents` documents of one length."""
    ids = np.concatenate([row.input_ids for row in rows])
    documents = [
        replace(rows[0], input_ids=part, loss_mask=np.zeros(len(part), np.bool_))
        for part in np.array_split(ids, num_documents)
    ]
    return with_labels(documents, _num_labels(rows))


def _num_labels(rows: Sequence[Example]) -> int:
    return sum(int(np.count_nonzero(row.loss_mask)) for row in rows)


def _max_labels(rows: Rows, num_tokens: int) -> int:
    """Return an upper bound of the labels among so many tokens: those of the rows with the largest share of labels."""
    order = np.argsort(-rows.num_labels / rows.lengths, kind="stable")
    tokens, labels = (np.cumsum(sizes[order], dtype=np.int64) for sizes in (rows.lengths, rows.num_labels))
    return int(labels[min(int(np.searchsorted(tokens, num_tokens)), len(order) - 1)])


def _padded_rows(rows: Rows, num_rows: int) -> list[Example]:
    """Return copies of the longest row, with the labels of the rows with most labels."""
    num_rows = min(num_rows, len(rows))
    longest = rows[int(np.argmax(rows.lengths))]
    return with_labels([longest] * num_rows, _sum_of_largest(rows.num_labels, num_rows))


def _stream_rows(stream: RowStream, config: RunConfig, num_rows: int) -> list[Example]:
    head, length = stream.head(), config.data.max_length
    share = max(np.count_nonzero(row.loss_mask) / len(row.input_ids) for row in head)
    full = replace(head[0], input_ids=np.resize(head[0].input_ids, length), loss_mask=np.zeros(length, np.bool_))
    return with_labels([full] * num_rows, num_rows * math.ceil(share * length))


def _fullest_packs(rows: Rows, config: RunConfig, num_packs: int) -> list[Example]:
    """Return the documents of the fullest packs, with the labels of the packs with most labels."""
    order = PackOrder(rows.lengths, max_length=config.data.max_length, seed=config.run.seed, batch_size=num_packs)
    num_labels = max(
        _sum_of_largest(_sum_by_pack(order, rows.num_labels, epoch), num_packs) for epoch in range(NUM_EPOCHS)
    )
    indices, starts = order.packs(0)
    fullest = np.argsort(-_sum_by_pack(order, rows.lengths, 0), kind="stable")[:num_packs]
    documents = [int(row) for pack in fullest for row in indices[starts[pack] : starts[pack + 1]]]
    return with_labels([rows[index] for index in documents], num_labels)


def _sum_by_pack(order: PackOrder, sizes: npt.NDArray[np.int32], epoch: int) -> npt.NDArray[np.int64]:
    rows, starts = order.packs(epoch)
    return np.add.reduceat(sizes[rows].astype(np.int64), starts[:-1])


def _sum_of_largest(sizes: npt.NDArray[np.int64], count: int) -> int:
    return int(np.sort(sizes)[::-1][:count].sum())


def with_labels(rows: Sequence[Example], num_labels: int) -> list[Example]:
    """Return rows with `num_labels` labels in total, or with as many as fit: the first token of a row has none."""
    labelled = []
    for row in rows:
        count = min(num_labels, len(row.input_ids) - 1)
        num_labels -= count
        labelled.append(replace(row, loss_mask=np.arange(len(row.input_ids)) >= len(row.input_ids) - count))
    return labelled
