"""A JSON file that is one list of objects, which is held in memory as text; any other .json file is read as JSON lines."""

import re
from collections.abc import Iterator
from functools import partial

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.chunk import MAX_ROW_BYTES, Chunk, check_row_size
from qlora_train.data.readers.json_lines import line_chunks
from qlora_train.data.readers.json_values import DECODER, json_error, json_type
from qlora_train.data.readers.text_file import not_utf8, read_blocks
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

SPACE = re.compile(r"[ \t\r\n]*")


def json_chunks(file: DataFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a .json file."""
    start, _ = next(read_blocks(file))
    if not start.lstrip(b" \t\r\n").startswith(b"["):
        yield from line_chunks(file, chunk_bytes)
        return
    content = b"".join(block for block, _ in read_blocks(file))
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(file.name, content, error.start) from None
    size = file.path.stat().st_size
    records: list[Record] = []
    begin = 0
    for record, end in _objects(file.name, text):
        records.append(record)
        if end - begin >= chunk_bytes:
            yield Chunk(partial(iter, records), size * (end - begin) // len(text), holds_rows=True)
            records, begin = [], end
    if records:
        yield Chunk(partial(iter, records), size * (len(text) - begin) // len(text), holds_rows=True)


def _objects(name: str, text: str) -> Iterator[tuple[Record, int]]:
    """Yield (record, position behind it) of each object of the list."""
    position = _after_space(text, _after_space(text, 0) + 1)
    line, counted = 1, 0
    mark = text[position : position + 1]
    while mark != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{name}:{line}"
        try:
            value, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise json_error(error, partial(_location, name, text), where, "expected a list of objects") from None
        if type(value) is not dict:
            raise DataError(f"{where}: found {json_type(value)}; expected an object")
        if end - position > MAX_ROW_BYTES // 4:  # a character has up to four bytes
            check_row_size(where, len(text[position:end].encode()))
        yield Record(where, value), end
        position = _after_space(text, end)
        mark = text[position : position + 1]
        if mark == ",":
            position = _after_space(text, position + 1)
        elif mark != "]":
            raise _broken(name, text, position, "a comma or the end of the list")
    position = _after_space(text, position + 1)
    if position < len(text):
        raise _broken(name, text, position, "the end of the file after the list")


def _broken(name: str, text: str, position: int, expected: str) -> DataError:
    found = repr(text[position : position + 20].rstrip()) if position < len(text) else "the end of the file"
    return DataError(f"{_location(name, text, position)}: broken JSON: found {found}; expected {expected}")


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _location(name: str, text: str, position: int) -> str:
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    return f"{name}:{line}:{column}"
