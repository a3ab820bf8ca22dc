"""The largest batches that a run can meet, made from its own rows: no real batch has more tokens or more labels.

Memory grows with the tokens of a micro-batch, padding included, and with those of them that carry loss. The rows with most
tokens need not be those with most labels: the batch that is made here has the most of both.

The backward pass of the varlen kernel allocates 128 float32 rows of queries per document besides (FlashAttention-2's
`dq_accum`): a flattened batch of as many tokens in the most documents is made too.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.data.collate import TokenBudget
from qlora_train.data.packing import PackOrder
from qlora_train.data.streaming import RowStream
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example

NUM_EPOCHS = 8
"""Epochs whose packs are looked at: rows of equal length change places between them, and their labels with them."""


def worst_case_rows(data: PreparedData, config: RunConfig) -> list[Example]:
    """Return the rows of a micro-batch as large as any of the run's, where each row computes all of its tokens.

    Of a stream, whose rows are not known, it is full rows of `data.max_length`, with the largest share of labels that its
    beginning has.
    """
    num_rows = config.train.per_device_train_batch_size
    if isinstance(data.train, RowStream):
        return _of_stream(data.train, config, num_rows)
    return _fullest_packs(data.train, config, num_rows) if config.data.packing else _padded(data.train, num_rows)


def token_budget(rows: Rows, config: RunConfig, *, in_chunks: bool, min_tokens: int = 0) -> TokenBudget:
    """Return the most that a micro-batch holds which is filled with rows: the tokens of the largest that the settings make.

    Args:
        rows: of the run.
        config: its settings.
        in_chunks: the logits of a few labels exist at a time, so that more labels take hardly more memory. Without, the
            labels are those of the largest micro-batch too.
        min_tokens: tokens that it may hold where the settings make fewer, if a step has them; only with `in_chunks`.
    """
    num_rows = config.train.per_device_train_batch_size
    largest = _padded(rows, num_rows)
    num_tokens = sum(len(row.input_ids) for row in largest)
    if not in_chunks:
        return TokenBudget(num_tokens, sum(int(np.count_nonzero(row.loss_mask)) for row in largest))
    rows_per_step = num_rows * config.train.gradient_accumulation_steps
    num_tokens = max(num_tokens, min(min_tokens, _sum_of_largest(rows.lengths, rows_per_step)))
    return TokenBudget(num_tokens, min(_sum_of_largest(rows.num_labels, rows_per_step), _most_labels(rows, num_tokens)))


def repeat_to_budget(row: Example, most: TokenBudget) -> list[Example]:
    """Return as many copies of a row as a micro-batch holds, the last one cut, with as many labels as it holds."""
    tokens = np.resize(row.input_ids, most.max_tokens)
    size = len(row.input_ids)
    parts = [tokens[begin : begin + size] for begin in range(0, most.max_tokens, size)]
    return with_labels([replace(row, input_ids=part) for part in parts], most.max_labels)


def max_documents(rows: Rows, config: RunConfig, most: TokenBudget | None) -> int:
    """Return the most documents that a flattened micro-batch has; `most` is what it is filled to, None: it is not."""
    num_rows = config.train.per_device_train_batch_size
    if config.data.packing:
        packs = PackOrder(rows.lengths, max_length=config.data.max_length, seed=config.run.seed, batch_size=num_rows)
        return _sum_of_largest(np.diff(packs.packs(0)[1]), num_rows)
    if most is None:
        return num_rows
    shortest = np.sort(rows.lengths)[: num_rows * config.train.gradient_accumulation_steps]
    return int(np.searchsorted(np.cumsum(shortest, dtype=np.int64), most.max_tokens, side="right"))


def split_into_documents(rows: Sequence[Example], num_documents: int) -> list[Example]:
    """Return the tokens of rows cut into so many documents of one length, with as many labels in all."""
    ids = np.concatenate([row.input_ids for row in rows])
    documents = [
        replace(rows[0], input_ids=part, loss_mask=np.zeros(len(part), np.bool_))
        for part in np.array_split(ids, num_documents)
    ]
    return with_labels(documents, sum(int(np.count_nonzero(row.loss_mask)) for row in rows))


def _most_labels(rows: Rows, num_tokens: int) -> int:
    """Return a bound of the labels that rows of so many tokens in all have: those with the largest share of labels."""
    order = np.argsort(-rows.num_labels / rows.lengths, kind="stable")
    tokens, labels = (np.cumsum(sizes[order], dtype=np.int64) for sizes in (rows.lengths, rows.num_labels))
    return int(labels[min(int(np.searchsorted(tokens, num_tokens)), len(order) - 1)])


def _padded(rows: Rows, num_rows: int) -> list[Example]:
    """Return the longest row as often as a micro-batch has rows, with the labels of the rows that have most."""
    num_rows = min(num_rows, len(rows))
    longest = rows[int(np.argmax(rows.lengths))]
    return with_labels([longest] * num_rows, int(np.sort(rows.num_labels)[::-1][:num_rows].sum()))


def _of_stream(stream: RowStream, config: RunConfig, num_rows: int) -> list[Example]:
    head, length = stream.head(), config.data.max_length
    share = max(np.count_nonzero(row.loss_mask) / len(row.input_ids) for row in head)
    full = replace(head[0], input_ids=np.resize(head[0].input_ids, length), loss_mask=np.zeros(length, np.bool_))
    return with_labels([full] * num_rows, num_rows * math.ceil(share * length))


def _fullest_packs(rows: Rows, config: RunConfig, num_packs: int) -> list[Example]:
    """Return the documents of the fullest packs, with the labels of those that have most."""
    order = PackOrder(rows.lengths, max_length=config.data.max_length, seed=config.run.seed, batch_size=num_packs)
    num_labels = max(
        _sum_of_largest(_of_packs(order, rows.num_labels, epoch), num_packs) for epoch in range(NUM_EPOCHS)
    )
    numbers, starts = order.packs(0)
    fullest = np.argsort(-_of_packs(order, rows.lengths, 0), kind="stable")[:num_packs]
    documents = [int(row) for pack in fullest for row in numbers[starts[pack] : starts[pack + 1]]]
    return with_labels([rows[number] for number in documents], num_labels)


def _of_packs(order: PackOrder, sizes: npt.NDArray[np.int32], epoch: int) -> npt.NDArray[np.int64]:
    """Return the sum of the rows' sizes in each pack of an epoch, (num_packs,)."""
    rows, starts = order.packs(epoch)
    return np.add.reduceat(sizes[rows].astype(np.int64), starts[:-1])


def _sum_of_largest(sizes: npt.NDArray[np.int64], count: int) -> int:
    return int(np.sort(sizes)[::-1][:count].sum())


def with_labels(rows: Sequence[Example], num_labels: int) -> list[Example]:
    """Return rows with so many labels in all, or with as many as they can have: no first token is one."""
    found = []
    for row in rows:
        count = min(num_labels, len(row.input_ids) - 1)
        num_labels -= count
        found.append(replace(row, loss_mask=np.arange(len(row.input_ids)) >= len(row.input_ids) - count))
    return found
