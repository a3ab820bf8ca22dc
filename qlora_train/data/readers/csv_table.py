"""Comma- and tab-separated tables with a header: fields in double quotes may hold separators, newlines and quotes."""

import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.chunk import MAX_ROW_BYTES, Chunk, check_column_names, check_row_size, header_text
from qlora_train.data.readers.text_file import line_blocks, numbered_lines
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

SEPARATORS = {"csv": (",", "comma", r"[;\t|]"), "tsv": ("\t", "tab", r"[,;|]|  ")}
"""Kind -> its separator, the separator's name, and a pattern that a header with another separator matches."""


def table_chunks(file: DataFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a .csv or .tsv file."""
    lines = _Lines(file)
    rows = _rows(file, csv.reader(lines, strict=True, delimiter=SEPARATORS[file.kind][0]))
    where, header = next(rows, (file.name, []))
    check_column_names(header, where)
    _check_separator(header, where, file.kind)
    records: list[Record] = []
    size = accounted = 0
    for where, fields in rows:
        if len(fields) != len(header):
            found = f"{len(fields)} field{'s' * (len(fields) > 1)}"
            raise DataError(f"{where}: found {found}; expected {len(header)}: {header_text(header)}")
        records.append(Record(where, dict(zip(header, fields, strict=True))))
        size += sum(map(len, fields))
        if size >= chunk_bytes:
            yield Chunk(partial(iter, records), lines.num_bytes_read - accounted, holds_rows=True)
            records, size, accounted = [], 0, lines.num_bytes_read
    if records:
        yield Chunk(partial(iter, records), lines.num_bytes_read - accounted, holds_rows=True)


def _check_separator(header: Sequence[str], where: str, kind: str) -> None:
    _, name, others = SEPARATORS[kind]
    if len(header) == 1 and re.search(others, header[0]):
        raise DataError(
            f"{where}: found the header {header_text(header)} without a {name}; expected {name}s between columns: save "
            f"the file {name}-separated"
        )


class _Lines:
    """The lines of a file with their newlines; counts the bytes read from disk."""

    def __init__(self, file: DataFile) -> None:
        self._file, self.num_bytes_read = file, 0

    def __iter__(self) -> Iterator[str]:
        for block in line_blocks(self._file):
            self.num_bytes_read += block.num_bytes
            for _, line in numbered_lines(self._file.name, block.first_line, block.content):
                yield line + "\n"


def _rows(file: DataFile, reader: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield (location of its first line, fields) of each row that is not blank."""
    while True:
        where = f"{file.name}:{reader.line_num + 1}"
        try:
            with _field_size_limit():
                fields = next(reader, None)
        except csv.Error as error:
            check_row_size(where, MAX_ROW_BYTES + ("field larger" in str(error)))
            raise DataError(
                f"{where}: broken {file.kind.upper()}: {error}; expected every quote closed, quotes inside doubled, and "
                "lines that end with a newline"
            ) from None
        if fields is None:
            return
        if fields:
            if sum(map(len, fields)) > MAX_ROW_BYTES // 4:  # a character has up to four bytes
                check_row_size(where, sum(len(field.encode()) for field in fields))
            yield where, fields


@contextlib.contextmanager
def _field_size_limit() -> Iterator[None]:
    """Set the csv module's limit, which is global and 128 KiB by default, while a row is read."""
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
