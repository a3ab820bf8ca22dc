"""The entry of the data stage: sources -> tokenised stores -> the rows to train on and to hold out, with a report.

It needs only the tokenizer, so that bad data stops a run before any weights are loaded.
"""

import datetime
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_train.config.objectives import DatasetType
from qlora_train.config.schema import DataSection, Source
from qlora_train.data.chat_template import is_dated
from qlora_train.data.data_report import NUM_FIRST_ROWS, DataReport, SourceReport, check_max_dropped
from qlora_train.data.decoded_rows import decode_rows
from qlora_train.data.held_out_rows import RunRows
from qlora_train.data.pair_report import PairReport
from qlora_train.data.reason_counts import ReasonCounts
from qlora_train.data.selection import StoredTexts, first_occurrences, held_out_mask, is_among, mix, num_duplicates
from qlora_train.data.source_store import SourceStore, SourceTokenizer
from qlora_train.data.split_report import SplitReport
from qlora_train.data.token_store import Rows
from qlora_train.parallel import context
from qlora_train.utils.errors import DataError
from qlora_train.utils.num_cores import num_cores

log = logging.getLogger("qlora_train")


@dataclass(frozen=True, slots=True)
class PreparedData(RunRows):
    """The rows that trainer and evaluation need, with their report.

    `fingerprint` is a sha256 that changes with any token or mask, and with which rows are used and their order.
    """

    report: DataReport
    fingerprint: str


def prepare_data(
    data: DataSection,
    tokenizer: Any,
    seed: int,
    *,
    date: datetime.date | None = None,
    vocabulary_size: int | None = None,
    dataset_type: DatasetType = "language_modeling",
) -> PreparedData:
    """Read, render, tokenise, check and choose the rows.

    Args:
        tokenizer: a fast Transformers tokenizer, with a chat template unless the rows are plain text or tokens.
        seed: decides the rows of a sample, and the held-out rows when `data.eval` is a share.
        date: the day that dated chat templates print; None is today. A resumed run must pass the day of its start, or
            its tokens change overnight.
        vocabulary_size: token ids that the model has; None is the tokenizer's.
        dataset_type: that the objective trains on.

    Raises:
        ConfigError: `data.columns` does not fit `data.format`.
        DataError: a source is missing or malformed, more rows than `data.max_dropped` are unusable, or no row is left to
            train on or to hold out.
    """
    day = date or datetime.date.today()
    share = data.eval if isinstance(data.eval, float) else 0.0
    sources = SourceTokenizer(data, tokenizer, day, vocabulary_size or len(tokenizer), dataset_type)
    eval_sources = data.eval if isinstance(data.eval, tuple) else ()
    held_out = _stores("data.eval", eval_sources, sources, StoredTexts(everything=True), data.max_dropped)
    train: list[SourceStore] = []
    if not data.streaming:
        kept = StoredTexts(share=share, seed=seed if share else 0)
        train = _stores("data.train", data.train, sources, kept, data.max_dropped)
    if is_dated(tokenizer) and (data.streaming or any(not each.is_plain for each in (*train, *held_out))):
        log.debug("chat template: prints the current date; every row is rendered for %s", day.isoformat())
    if data.streaming:
        return _streamed(data, sources, held_out, tokenizer, seed)
    return _selected(data, train, held_out, tokenizer, seed)


def _stores(
    key: str, sources: Sequence[Source], tokenizer: SourceTokenizer, kept: StoredTexts, max_dropped: float
) -> list[SourceStore]:
    stores = [tokenizer.store(key, source, kept) for source in sources]
    check_max_dropped(key, [each.store.summary for each in stores], max_dropped)
    return stores


def _streamed(
    data: DataSection, sources: SourceTokenizer, held_out: Sequence[SourceStore], tokenizer: Any, seed: int
) -> PreparedData:
    """Open the stream of the training rows; the report is of its first window."""
    from qlora_train.data.streaming import RowStream

    train = RowStream(
        [sources.streamed("data.train", source) for source in data.train], seed=seed,
        num_proc=data.num_proc or max(1, num_cores() // context().local_world_size), max_dropped=data.max_dropped,
    )  # fmt: skip
    eval_rows = Rows.all_of([each.store for each in held_out])
    head = train.head()
    lengths = np.array([row.num_tokens for row in head], np.int32)
    num_labels = np.array([row.num_labels for row in head], np.int32)
    head_reports = (
        SourceReport("data.train", source.path, summary, num_used=summary.num_rows)
        for source, summary in zip(train.sources, train.summaries(), strict=True)
    )
    report = DataReport(
        max_length=data.max_length,
        overflow=data.overflow,
        sources=(*head_reports, *_source_reports("data.eval", held_out, eval_rows)),
        splits={
            "data.train": SplitReport.of(
                lengths, num_labels, num_at_max_length=int(np.count_nonzero(lengths == data.max_length))
            ),
            **_split_report("data.eval", eval_rows, data.max_length),
        },
        first_rows=decode_rows(head[:NUM_FIRST_ROWS], tokenizer),
        is_streamed=True,
    )
    return PreparedData(train, eval_rows, None, report, f"{train.fingerprint} {fingerprint(eval_rows)}")


def _selected(
    data: DataSection, train: Sequence[SourceStore], held_out: Sequence[SourceStore], tokenizer: Any, seed: int
) -> PreparedData:
    """Hold out, deduplicate and sample the stored rows."""
    rows, eval_rows = (Rows.all_of([each.store for each in stores]) for stores in (train, held_out))
    if isinstance(data.eval, float):
        mask = held_out_mask(rows.group_digests, data.eval, seed)
        rows, eval_rows = rows.select(~mask), rows.select(mask)
        log.debug("data.eval: %d rows to train on, %d held out", len(rows), len(eval_rows))
    overlap = ReasonCounts()
    num_removed = 0
    if data.deduplicate:
        is_new = first_occurrences(rows) & ~is_among(rows, eval_rows)
        num_removed = int((~is_new).sum())
        rows = rows.select(is_new)
        if not len(rows):
            raise DataError("data.deduplicate: every row of data.train is in data.eval too; give other rows to one")
    else:
        for index in np.flatnonzero(is_among(eval_rows, rows)):
            reason = (
                "of prompts that are in data.train too" if rows.has_pairs or rows.is_unpaired else "in data.train too"
            )
            overlap.add(reason, eval_rows[int(index)].where)
    rows = mix(data.train, rows, data.max_rows, seed)
    report = DataReport(
        max_length=data.max_length,
        overflow=data.overflow,
        sources=(*_source_reports("data.train", train, rows), *_source_reports("data.eval", held_out, eval_rows)),
        splits={
            **_split_report("data.train", rows, data.max_length, num_deduplicated=num_removed),
            **_split_report("data.eval", eval_rows, data.max_length),
        },
        first_rows=decode_rows(rows[:NUM_FIRST_ROWS], tokenizer),
        overlap=overlap,
    )
    return PreparedData(rows, eval_rows, len(rows), report, fingerprint(rows, eval_rows))


def _split_report(key: str, rows: Rows, max_length: int, **counts: int) -> dict[str, SplitReport]:
    if not len(rows):
        return {}
    counts["num_duplicates"] = num_duplicates(rows)
    counts["num_at_max_length"] = int(np.count_nonzero(rows.max_lengths == max_length))
    pairs = PairReport.of(rows) if rows.has_pairs else None
    num_desirable = int(rows.desirable.sum()) if rows.is_unpaired else None
    return {key: SplitReport.of(rows.lengths, rows.num_labels, pairs=pairs, num_desirable=num_desirable, **counts)}


def _source_reports(key: str, sources: Sequence[SourceStore], rows: Rows) -> list[SourceReport]:
    num_used = np.bincount(rows.store_indices, minlength=len(sources)).tolist()
    return [
        SourceReport(key, each.source.path, each.store.summary, num_used=used, cached=each.cached)
        for each, used in zip(sources, num_used, strict=False)
    ]


def fingerprint(*splits: Rows) -> str:
    """Return a sha256 that changes with any token, mask or label of the stores, and with which of their rows are used."""
    digest = hashlib.sha256()
    for rows in splits:
        for store in rows.stores:
            digest.update(store.summary.content_sha256.encode())
        digest.update(rows.indices.tobytes())
        digest.update(b"end of part")
    return digest.hexdigest()
