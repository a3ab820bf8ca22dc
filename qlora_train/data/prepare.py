"""The data stage's entry: sources -> tokenised stores -> the rows to train on and to hold out; nothing is lost in silence.

It needs the tokenizer only, so that bad data stops a run before any weights are loaded.
"""

import datetime
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_train.config.schema import DataSection, Source
from qlora_train.data.chat_template import is_dated
from qlora_train.data.data_report import (
    NUM_FIRST_ROWS,
    DataReport,
    PartReport,
    SourceReport,
    SystemPrompt,
    check_limits,
)
from qlora_train.data.held_out_rows import RunRows
from qlora_train.data.reason_counts import merged, tally_of
from qlora_train.data.rendered_rows import render_rows
from qlora_train.data.selection import first_of_equals, is_among, mix, num_repeats, split
from qlora_train.data.source_store import SourceStore, StoreMaker
from qlora_train.data.streaming import RowStream
from qlora_train.data.token_store import Rows
from qlora_train.data.tokenize_chunk import StoredTexts
from qlora_train.data.types import ReasonCounts
from qlora_train.data.worker_pool import num_cores
from qlora_train.utils.errors import DataError

log = logging.getLogger("qlora_train")


@dataclass(frozen=True, slots=True)
class PreparedData(RunRows):
    """Everything the trainer and the evaluation need.

    `report` says what became of every row. `fingerprint` is a sha256 that changes when any token or mask does, or which
    rows are taken, or their order.
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
) -> PreparedData:
    """Read, render, tokenise, check and choose the rows.

    Args:
        data: the section of the config.
        tokenizer: a fast Transformers tokenizer, with a chat template unless the rows are plain text or tokens.
        seed: decides which rows a sample holds, and which are held out when `data.eval` is a share.
        date: the day that a chat template which writes the current date is rendered for; None is today. A run that is
            to be resumed or measured later must remember it and pass it again, or its tokens change overnight.
        vocabulary_size: token ids that the model has; None is the tokenizer's.

    Raises:
        ConfigError: `data.columns` does not fit `data.format`.
        DataError: a source is missing or malformed, more rows than `data.max_dropped` cannot be used, or nothing is
            left to train on or to hold out.
    """
    day = date or datetime.date.today()
    share = data.eval if isinstance(data.eval, float) else 0.0
    maker = StoreMaker(data, tokenizer, day, vocabulary_size or len(tokenizer))
    share = data.eval if isinstance(data.eval, float) else 0.0
    kept = StoredTexts(share=share, seed=seed if share else 0)
    sources = data.eval if isinstance(data.eval, tuple) else ()
    held_out = _read("data.eval", sources, maker, StoredTexts(everything=True), data.max_dropped)
    train = [] if data.streaming else _read("data.train", data.train, maker, kept, data.max_dropped)
    if is_dated(tokenizer) and (data.streaming or any(not each.is_plain for each in (*train, *held_out))):
        log.info("chat template: writes the current date; every row is rendered for %s", day.isoformat())
    if data.streaming:
        return _streamed(data, maker, held_out, tokenizer, seed)
    chosen = _choose(
        data, Rows.every([each.store for each in train]), Rows.every([each.store for each in held_out]), seed
    )
    report = _report(data, chosen, train, held_out, tokenizer)
    return PreparedData(chosen.train, chosen.eval, len(chosen.train), report, fingerprint(chosen.train, chosen.eval))


def _read(
    key: str, sources: Sequence[Source], maker: StoreMaker, kept: StoredTexts, max_dropped: float
) -> list[SourceStore]:
    """Return the stores of all sources of a part, which together keep to `data.max_dropped`."""
    stores = [maker.store(key, source, kept) for source in sources]
    if stores:
        summaries = [each.store.summary for each in stores]
        dropped = merged(summary.dropped for summary in summaries)
        check_limits(key, dropped, sum(summary.num_records for summary in summaries), max_dropped)
    return stores


def _streamed(
    data: DataSection, maker: StoreMaker, held_out: Sequence[SourceStore], tokenizer: Any, seed: int
) -> PreparedData:
    """Open the stream of the training rows; the report is of its first window."""
    train = RowStream(
        [maker.streamed("data.train", source) for source in data.train], seed=seed, num_proc=data.num_proc or num_cores(),
        vocabulary_size=maker.vocabulary_size, max_dropped=data.max_dropped,
    )  # fmt: skip
    rows = Rows.every([each.store for each in held_out])
    head = train.head()
    lengths = np.array([len(row.input_ids) for row in head], np.int32)
    num_labels = np.array([np.count_nonzero(row.loss_mask) for row in head], np.int32)
    parts = {"data.train": PartReport.of(lengths, num_labels, max_length=data.max_length, num_repeats=0)}
    if len(rows):
        parts["data.eval"] = PartReport.of(
            rows.lengths, rows.num_labels, max_length=data.max_length, num_repeats=num_repeats(rows)
        )
    beginnings = (
        SourceReport.of("data.train", source.path, summary, num_taken=summary.num_rows, cached=False)
        for source, summary in zip(train.sources, train.summaries(), strict=True)
    )
    report = DataReport(
        max_length=data.max_length, overflow=data.overflow,
        sources=(*beginnings, *_source_reports("data.eval", held_out, rows)), parts=parts, overlap=ReasonCounts(),
        first_rows=render_rows(head[:NUM_FIRST_ROWS], tokenizer), is_streamed=True,
        system_prompt=SystemPrompt.shared((summary, summary.num_rows) for summary in train.summaries()),
    )  # fmt: skip
    return PreparedData(train, rows, None, report, f"{train.fingerprint} {fingerprint(rows)}")


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The rows that are used, and what was seen on the way: repeats by part, removed rows, rows on both sides."""

    train: Rows
    eval: Rows
    num_repeats: dict[str, int]
    num_deduplicated: int
    overlap: ReasonCounts


def _choose(data: DataSection, train: Rows, held_out: Rows, seed: int) -> _Chosen:
    if isinstance(data.eval, float):
        is_held = split(train.digests, data.eval, seed)
        train, held_out = train.where(~is_held), train.where(is_held)
        log.info("data.eval: %d rows to train on, %d held out", len(train), len(held_out))
    overlap = tally_of(held_out, is_among(held_out, train), "stands in data.train too")
    num_deduplicated = 0
    if data.deduplicate:
        is_new = first_of_equals(train) & ~is_among(train, held_out)
        num_deduplicated, overlap = int((~is_new).sum()), ReasonCounts()
        train = train.where(is_new)
        if not len(train):
            raise DataError("data.deduplicate: every row of data.train stands in data.eval too; give other rows to one")
    mixture = mix(data.train, train, data.max_rows, seed)
    repeats = {"data.train": num_repeats(mixture), "data.eval": num_repeats(held_out)}
    return _Chosen(mixture, held_out, repeats, num_deduplicated, overlap)


def _report(
    data: DataSection, chosen: _Chosen, train: Sequence[SourceStore], held_out: Sequence[SourceStore], tokenizer: Any
) -> DataReport:
    used = {"data.train": chosen.train, "data.eval": chosen.eval}
    parts = {
        key: PartReport.of(
            rows.lengths,
            rows.num_labels,
            max_length=data.max_length,
            num_repeats=chosen.num_repeats[key],
            num_deduplicated=chosen.num_deduplicated if key == "data.train" else 0,
        )
        for key, rows in used.items()
        if len(rows)
    }
    return DataReport(
        max_length=data.max_length,
        overflow=data.overflow,
        sources=(
            *_source_reports("data.train", train, chosen.train),
            *_source_reports("data.eval", held_out, chosen.eval),
        ),
        parts=parts,
        overlap=chosen.overlap,
        first_rows=render_rows(chosen.train[:NUM_FIRST_ROWS], tokenizer),
        system_prompt=SystemPrompt.shared(
            zip((each.store.summary for each in train), _num_taken(train, chosen.train), strict=True)
        ),
    )


def _source_reports(key: str, sources: Sequence[SourceStore], rows: Rows) -> list[SourceReport]:
    return [
        SourceReport.of(key, each.source.path, each.store.summary, num_taken=taken, cached=each.cached)
        for each, taken in zip(sources, _num_taken(sources, rows), strict=False)
    ]


def _num_taken(sources: Sequence[SourceStore], rows: Rows) -> list[int]:
    """Return how many of the rows each source gives."""
    counts: list[int] = np.bincount(rows.origins, minlength=len(sources)).tolist()
    return counts


def fingerprint(*parts: Rows) -> str:
    """Return a sha256 that changes with any token or mask of the stores, and with which of their rows are taken."""
    digest = hashlib.sha256()
    for rows in parts:
        for store in rows.stores:
            digest.update(store.summary.content_sha256.encode())
        digest.update(rows.indices.tobytes())
        digest.update(b"end of part")
    return digest.hexdigest()
