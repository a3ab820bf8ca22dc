"""JSON lines and plain text: one row per line, so that a chunk is a byte range that a worker reads by itself."""

import contextlib
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
BLOCK_BYTES = 1 << 20
MAX_COUNTED_BYTES = 256 << 20
"""Bytes of a file that are searched for more broken lines."""
MAX_LINES = 5
"""Numbers of broken lines in a message."""


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
            try:
                values = _object(where, line, EXPECTED[file.kind])
            except DataError as error:
                raise DataError(f"{error}{_other_broken_lines(file, number)}") from None
            yield Record(where, values)


def _other_broken_lines(file: DataFile, number: int) -> str:
    """Return how many lines after line `number` are no JSON objects either, to append to the error of that line."""
    broken: list[int] = []
    num_bytes = 0
    with contextlib.suppress(DataError):  # of another kind: the file's encoding, for example
        for content, _, first_line, size in line_blocks(file, BLOCK_BYTES):
            broken += [
                other
                for other, line in numbered_lines(file.name, first_line, content)
                if other > number and line.strip() and not _is_object(line)
            ]
            num_bytes += size
            if num_bytes >= MAX_COUNTED_BYTES:
                break
    if not broken:
        return ""
    shown = ", ".join(map(str, broken[:MAX_LINES])) + ", ..." * (len(broken) > MAX_LINES)
    at_least = "at least " * (num_bytes >= MAX_COUNTED_BYTES)
    return f"; {at_least}{len(broken)} more broken line{'s' * (len(broken) > 1)}: {shown}"


def _is_object(line: str) -> bool:
    try:
        return type(DECODER.decode(line)) is dict
    except (ValueError, RecursionError):
        return False


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
