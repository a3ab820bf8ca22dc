"""JSON lines and plain text: one row per line, so that a chunk is a byte range that a worker reads by itself."""

from collections.abc import Iterator
from functools import partial

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.chunk import Chunk, check_row_size
from qlora_train.data.readers.json_values import DECODER, json_error, json_type
from qlora_train.data.readers.text_file import line_blocks, numbered_lines
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

EXPECTED = {
    "jsonl": "expected one JSON object per line (a list of objects is a .json file)",
    "json": "expected a list of objects, or one object per line",
}


def line_chunks(file: DataFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file with one row per line; the bytes of a compressed file travel in the chunk."""
    for content, offset, first_line, num_bytes in line_blocks(file, chunk_bytes):
        if file.compression:
            yield Chunk(partial(_records, file, first_line, content), num_bytes, holds_rows=True)
        else:
            yield Chunk(partial(_records_at, file, first_line, offset, len(content)), num_bytes)


def _records_at(file: DataFile, first_line: int, offset: int, length: int) -> Iterator[Record]:
    try:
        with file.path.open("rb") as handle:
            handle.seek(offset)
            content = handle.read(length)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror}") from None
    if len(content) < length:
        raise DataError(f"{file.name}: the file became shorter while it was read; start again when it is whole")
    yield from _records(file, first_line, content)


def _records(file: DataFile, first_line: int, content: bytes) -> Iterator[Record]:
    for number, line in numbered_lines(file.name, first_line, content):
        if not line or line.isspace():
            continue
        where = f"{file.name}:{number}"
        check_row_size(where, len(line))
        if file.kind == "txt":
            yield Record(where, {"text": line.removesuffix("\r")})
        else:
            yield Record(where, _object(where, line, EXPECTED[file.kind]))


def _object(where: str, line: str, expected: str) -> dict[str, object]:
    try:
        value = DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        if line.startswith("\ufeff"):
            found = "a byte-order mark inside the file (files joined?); expected none: remove it"
            raise DataError(f"{where}: found {found}") from None
        raise json_error(error, lambda position: f"{where}:{position + 1}", where, expected) from None
    if type(value) is not dict:
        raise DataError(f"{where}: found {json_type(value)}; {expected}")
    return value
