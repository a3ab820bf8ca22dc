"""A first look at a data set: format, columns to rename, number of rows and their lengths."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.config import Source
from qlora_train.config.objectives import DatasetType
from qlora_train.data.column_hints import preference_columns, question_and_answer, unpaired_columns
from qlora_train.data.data_file import DataFile
from qlora_train.data.extra_columns import LABELS
from qlora_train.data.formats import FORMATS, recognise
from qlora_train.data.readers import read_chunks
from qlora_train.data.reason_counts import ReasonCounts
from qlora_train.data.row_reader import RowReader
from qlora_train.data.sources import find_files
from qlora_train.data.types import Record, Row, UnusableRowError
from qlora_train.utils.errors import DataError

MAX_ROWS = 100_000
"""Rows that are looked at."""
CHUNK_BYTES = 1 << 20
BATCH_ROWS = 256
CHARACTERS_PER_TOKEN = 3
"""Without a tokenizer; English has 4 to 5, code and other languages fewer."""
TOKENS_PER_TURN = 8
"""Of a chat template: role, and the marks around a turn."""
HEADER_TOKENS = 32
"""Of a chat template: a default system prompt or date."""
KEY = "--data"


@dataclass(frozen=True, slots=True)
class DataLook:
    """What a config depends on.

    Attributes:
        format: a name of `FORMATS`.
        columns: for `data.columns`; empty if the columns have the format's names.
        num_rows: usable rows; of a larger data set, those that were looked at (`is_partial`).
        unusable: rows that cannot be used, by reason, with `file:line`.
        median: tokens of a row, `percentile_99` and `longest` likewise; estimates, since no chat template is applied.
        is_counted: by the base's tokenizer, not by characters.
    """

    format: str
    columns: Mapping[str, str]
    num_rows: int
    unusable: ReasonCounts
    median: int
    percentile_99: int
    longest: int
    is_counted: bool
    is_partial: bool
    has_tools: bool
    has_reasoning: bool
    is_chat: bool

    @property
    def dataset_type(self) -> DatasetType:
        """The objectives' type of data set."""
        return FORMATS[self.format].dataset_type


def look_at_data(source: Source, tokenizer: Any) -> DataLook:
    """Read the first rows of a data set.

    Args:
        tokenizer: of the package `tokenizers`; None: lengths are estimated from characters.

    Raises:
        DataError: nothing is found, its columns fit no format, or no row can be used.
    """
    records = _records(find_files(source, KEY))
    first = next(records, None)
    if first is None:
        raise DataError(f"{KEY}: {source.path} holds no rows; expected at least one")
    format_name, columns = _format_of(first)
    reader, unusable, rows = RowReader(format_name, columns), ReasonCounts(), list[Row]()
    parts = itertools.chain.from_iterable(map(reader.split, itertools.chain([first], records)))
    for record in itertools.islice(parts, MAX_ROWS):
        try:
            rows.append(reader.read(record))
        except UnusableRowError as error:
            unusable.add(error.reason, record.where)
    if not rows:
        raise DataError(
            f"{KEY}: none of {unusable.total} rows of {source.path} can be used: {unusable.summary()}; correct them"
        )
    lengths = sorted(_lengths(rows, tokenizer))
    return DataLook(
        format=format_name,
        columns=columns,
        num_rows=len(rows),
        unusable=unusable,
        median=lengths[(len(lengths) - 1) // 2],
        percentile_99=lengths[math.ceil(0.99 * len(lengths)) - 1],
        longest=lengths[-1],
        is_counted=tokenizer is not None or format_name == "tokens",
        is_partial=next(records, None) is not None,
        has_tools=any(row.tools for row in rows),
        has_reasoning=any("reasoning_content" in turn or "<think>" in turn["content"] for turn in _answers(rows)),
        is_chat=rows[0].messages is not None,
    )


def _records(files: list[DataFile]) -> Iterator[Record]:
    for file in files:
        for chunk in read_chunks(file, chunk_bytes=CHUNK_BYTES):
            yield from chunk.records()


def _format_of(record: Record) -> tuple[str, Mapping[str, str]]:
    """Return the format of a record and the renames that read it: as it is, else with renamed columns."""
    attempts: list[tuple[DatasetType, Mapping[str, str]]] = [
        ("language_modeling", {}),
        ("preference", preference_columns(record.values) or {}),
        ("language_modeling", question_and_answer(record.values)),
    ]
    if any(name in record.values for name in LABELS):
        attempts.insert(0, ("unpaired_preference", unpaired_columns(record.values) or {}))
    if isinstance(record.values.get("chosen"), dict):  # ShareGPT pairs, whose conversations are prompts only
        attempts.insert(0, ("preference", preference_columns(record.values) or {}))
    problem: DataError | None = None
    for dataset_type, columns in attempts:
        try:
            return recognise(record, "auto", columns, dataset_type), columns
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _answers(rows: list[Row]) -> Iterator[Any]:
    return (turn for row in rows for turn in row.messages or () if turn["role"] == "assistant")


def _lengths(rows: list[Row], tokenizer: Any) -> Iterator[int]:
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        texts = [_texts(row) for row in batch]
        flat = list(itertools.chain.from_iterable(texts))
        counts = iter(_counts(flat, tokenizer))
        for row, own in zip(batch, texts, strict=True):
            yield sum(itertools.islice(counts, len(own))) + _overhead(row)


def _counts(texts: list[str], tokenizer: Any) -> list[int]:
    if tokenizer is None:
        return [math.ceil(len(text) / CHARACTERS_PER_TOKEN) for text in texts]
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _texts(row: Row) -> list[str]:
    """Return the texts of a row; of a pair, those of the longer conversation."""
    texts = [text for text in (row.prompt, row.text) if text]
    for turn in row.messages or ():
        texts += [turn["content"], turn.get("reasoning_content", "")]
        texts += [json.dumps(call) for call in turn.get("tool_calls", ())]
    texts += [json.dumps(tool) for tool in row.tools]
    other = [] if row.rejected is None else _texts(row.rejected)
    return max(texts, other, key=lambda found: sum(map(len, found)))


def _overhead(row: Row) -> int:
    """Return the tokens of a row that are in none of its texts."""
    if row.input_ids is not None:
        return len(row.input_ids)
    return HEADER_TOKENS + TOKENS_PER_TURN * len(row.messages) if row.messages else 1
