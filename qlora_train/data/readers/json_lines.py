"""JSON lines and plain text: a row a line, so that a chunk is a range of bytes which a worker reads by itself."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_train.data.readers.chunk import MAX_ROW_BYTES, refuse_large_row
from qlora_train.data.readers.json_values import DECODER, explained, kind_of
from qlora_train.data.readers.text_file import blocks, numbered_lines, read_range
from qlora_train.data.sources import DataFile
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

EXPECTED = {
    "jsonl": "expected one JSON object a line (a list of objects is a .json file)",
    "json": "expected a list of objects, or one object a line",
}


@dataclass(frozen=True, slots=True)
class LineChunk:
    """Whole lines of a file.

    Attributes:
        file: the file.
        offset: where they begin, in bytes; of use for files that are not compressed.
        length: how many bytes they are.
        first_line: the number of the first one.
        num_bytes: bytes of the file that they account for.
        content: the bytes themselves, of a file that is compressed.
    """

    file: DataFile
    offset: int
    length: int
    first_line: int
    num_bytes: int
    content: bytes | None

    @property
    def holds_rows(self) -> bool:
        """Whether the bytes themselves are here."""
        return self.content is not None

    def records(self) -> Iterator[Record]:
        """Yield a record a line that is not blank, in order."""
        name, content = self.file.name, self.content
        if content is None:
            try:
                content = read_range(self.file.path, name, self.offset, self.length)
            except OSError as error:
                raise DataError(f"{name}: cannot be read: {error.strerror}") from None
        lines = numbered_lines(name, self.first_line, content)
        if len(content) > MAX_ROW_BYTES:
            lines = _of_bearable_size(name, lines)
        return _texts(name, lines) if self.file.kind == "txt" else _objects(name, lines, EXPECTED[self.file.kind])


def line_chunks(file: DataFile, chunk_bytes: int) -> Iterator[LineChunk]:
    """Cut a file of a row a line."""
    for block in blocks(file, chunk_bytes):
        content = block.content if file.compression else None
        yield LineChunk(file, block.offset, len(block.content), block.first_line, block.num_bytes, content)


def _of_bearable_size(name: str, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if len(line) > MAX_ROW_BYTES // 4:  # which takes at most 4 bytes a character
            refuse_large_row(f"{name}:{number}", len(line.encode()))
        yield number, line


def _texts(name: str, lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    for number, line in lines:
        if line and not line.isspace():
            yield Record(f"{name}:{number}", {"text": line.removesuffix("\r")})


def _objects(name: str, lines: Iterator[tuple[int, str]], expected: str) -> Iterator[Record]:
    decode = DECODER.raw_decode
    for number, line in lines:
        if not line or line.isspace():
            continue
        where = f"{name}:{number}"
        try:
            value, end = decode(line)
            if end < len(line) and line[end:].strip(" \t\r"):
                value = DECODER.decode(line)
        except (ValueError, RecursionError):
            value = _decode_carefully(line.removesuffix("\r"), where, expected)
        if type(value) is not dict:
            raise DataError(f"{where}: found {kind_of(value)}; {expected}")
        yield Record(where, value)


def _decode_carefully(line: str, where: str, expected: str) -> object:
    """Decode a line that has spaces before its value, or is broken."""
    if line.startswith("\ufeff"):
        raise DataError(f"{where}: found a byte-order mark inside the file (files joined?); expected none: remove it")
    try:
        return DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise explained(error, lambda position: f"{where}:{position + 1}", where, expected) from None
