"""Comma- and tab-separated tables with a header: fields in double quotes may hold separators, newlines and quotes."""

import contextlib
import csv
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence

from qlora_train.data.readers.chunk import ParsedChunk, refuse_large_row
from qlora_train.data.readers.text_file import Block, blocks, numbered_lines
from qlora_train.data.sources import DataFile
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

SEPARATORS = {"csv": (",", "comma", r"[;\t|]"), "tsv": ("\t", "tab", r"[,;|]|  ")}
"""Kind -> its separator, that separator's name, and a pattern of what is found where another one was used."""

LONGEST_NAME, NUM_NAMES = 40, 20
"""Characters of a column's name, and names of columns, that a message shows."""


def table_chunks(file: DataFile, chunk_bytes: int) -> Iterator[ParsedChunk]:
    """Cut a .csv or .tsv file."""
    lines = _CountedLines(file)
    rows = _rows(file, lines)
    header = next((fields for _, fields in rows if fields), [])
    check_names(header, f"{file.name}:{lines.number}")
    _check_separator(header, file, lines.number)
    accounted = 0
    while parsed := _next_records(rows, header, file.name, lines, chunk_bytes):
        yield ParsedChunk(parsed, lines.num_bytes_read - accounted)
        accounted = lines.num_bytes_read


class _CountedLines:
    """The lines of a file with their endings, as csv.reader takes them; counts what it hands out.

    Attributes:
        number: of the last line.
        row_begin: line at which the row begins that is being read.
        row_bytes: what was handed out since then.
        total_bytes: what was handed out since the file's beginning.
        num_bytes_read: bytes on disk behind that.
    """

    def __init__(self, file: DataFile) -> None:
        self.number, self.row_begin, self.row_bytes, self.total_bytes, self.num_bytes_read = 0, 1, 0, 0, 0
        self._name = file.name
        self._lines = self._read(blocks(file))

    def _read(self, content: Iterator[Block]) -> Iterator[tuple[int, str]]:
        for block in content:
            self.num_bytes_read += block.num_bytes
            yield from numbered_lines(self._name, block.first_line, block.content)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        self.row_bytes += len(line) + 1
        self.total_bytes += len(line) + 1
        refuse_large_row(f"{self._name}:{self.row_begin}", self.row_bytes, at_least=True)
        return line + "\n"

    def begin_row(self) -> None:
        """Count anew from the next line on."""
        self.row_begin, self.row_bytes = self.number + 1, 0


def _rows(file: DataFile, lines: _CountedLines) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, fields) of each row; a blank line is a row without fields."""
    reader = csv.reader(lines, strict=True, delimiter=SEPARATORS[file.kind][0])
    while True:
        lines.begin_row()
        try:
            with _fields_of_any_size():
                fields = next(reader, None)
        except csv.Error as error:
            where = f"{file.name}:{lines.row_begin}: broken {file.kind.upper()}"
            if "new-line character" in str(error):
                raise DataError(f"{where}: found a carriage return that ends no line; expected newlines") from None
            raise DataError(f"{where}: {error}; expected every quote closed, quotes inside doubled") from None
        if fields is None:
            return
        yield lines.row_begin, fields


@contextlib.contextmanager
def _fields_of_any_size() -> Iterator[None]:
    """Lift the limit of the csv module, which is one for the process, while a row is read; rows have one of their own."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _next_records(
    rows: Iterator[tuple[int, list[str]]], header: Sequence[str], name: str, lines: _CountedLines, chunk_bytes: int
) -> tuple[Record, ...]:
    records: list[Record] = []
    begin = lines.total_bytes
    for line, fields in rows:
        if fields and len(fields) != len(header):
            found = f"{len(fields)} field{'s' * (len(fields) > 1)}"
            raise DataError(f"{name}:{line}: found {found}; expected {len(header)}: {listed(header)}")
        if fields:
            records.append(Record(f"{name}:{line}", dict(zip(header, fields, strict=True))))
        if records and lines.total_bytes - begin >= chunk_bytes:
            break
    return tuple(records)


def listed(names: Sequence[str]) -> str:
    """Join the names of columns for a message of one line, whatever a damaged header holds."""
    printable = ("".join(char if char.isprintable() else " " for char in name) for name in names[:NUM_NAMES])
    shown = [textwrap.shorten(name, LONGEST_NAME, placeholder="...") for name in printable]
    return ", ".join(shown) + ", ..." * (len(names) > NUM_NAMES)


def check_names(names: Sequence[str], where: str) -> None:
    """Raise if columns cannot be told apart by their names."""
    if not all(name.strip() for name in names):
        raise DataError(
            f"{where}: found the header {listed(names)}, where a column has no name; expected one for each (from "
            "pandas: to_csv(index=False))"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{where}: found the header {listed(names)}; expected a different name for each column")


def _check_separator(header: Sequence[str], file: DataFile, line: int) -> None:
    _, name, others = SEPARATORS[file.kind]
    if len(header) == 1 and re.search(others, header[0]):
        raise DataError(
            f"{file.name}:{line}: found the header {listed(header)} without a {name}; expected {name}s between columns: "
            f"save the file {name}-separated"
        )
