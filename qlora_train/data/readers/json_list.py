"""A JSON file that is one list of objects, read piece by piece; any other .json file is read as JSON lines."""

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, AnyStr

from qlora_train.data.readers.chunk import MAX_ROW_BYTES, Chunk, ParsedChunk, refuse_large_row
from qlora_train.data.readers.json_lines import line_chunks
from qlora_train.data.readers.json_values import DECODER, explained, kind_of
from qlora_train.data.readers.text_file import (
    BLOCK_BYTES,
    NUM_MAGIC_BYTES,
    TextStream,
    not_utf8,
    refuse_other_encodings,
)
from qlora_train.data.sources import DataFile
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

SPACE = re.compile(r"[ \t\r\n]*")
NUM_UNDECIDED = 16
"""An error of the decoder so near to the end of a text may only mean that the text goes on."""


def json_chunks(file: DataFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a .json file."""
    with contextlib.closing(TextStream(file)) as stream:
        text = _GrowingText(stream)
        if text.next_character() == "[":
            text.position += 1
            yield from _list_chunks(text, stream, chunk_bytes)
            return
    yield from line_chunks(file, chunk_bytes)


class _GrowingText:
    """The text of a file, of which only the part that is being decoded is kept.

    Attributes:
        position: of the next character to look at, in what is kept.
        has_ended: nothing comes behind what is kept.
    """

    def __init__(self, stream: TextStream) -> None:
        self.position = 0
        self._name, self._stream, self._text = stream.file.name, stream, ""
        self._marked, self._line, self._column = 0, 1, 1  # a position at or before `position`, and where it stands
        self._undecoded, self._byte_line, self._byte_column = b"", 1, 1
        start = stream.read(max(BLOCK_BYTES, NUM_MAGIC_BYTES))
        refuse_other_encodings(stream.file, start)
        self._append(start)

    def grow(self) -> None:
        """Read on, and drop what was looked at."""
        self._mark(self.position)
        self._text, self.position, self._marked = self._text[self.position :], 0, 0
        self._append(self._stream.read(BLOCK_BYTES))

    def _append(self, data: bytes) -> None:
        self.has_ended = not data
        content = self._undecoded + data
        try:
            decoded, used = codecs.utf_8_decode(content, "strict", not data)
        except UnicodeDecodeError as error:
            line, column = _advanced(self._byte_line, self._byte_column, content, b"\n", 0, error.start)
            raise not_utf8(f"{self._name}:{line}:{column}", content[error.start]) from None
        self._byte_line, self._byte_column = _advanced(self._byte_line, self._byte_column, content, b"\n", 0, used)
        self._undecoded = content[used:]
        self._text += decoded

    def next_character(self) -> str:
        """Skip white space and return the character behind it; nothing at the end of the file."""
        while True:
            match = SPACE.match(self._text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self._text):
                return self._text[self.position]
            if self.has_ended:
                return ""
            self.grow()

    def value(self, expected: str) -> tuple[Any, int]:
        """Decode the value at `position` and go behind it; return it and how many characters it takes."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                if self._may_go_on(error):
                    self.grow()
                    continue
                raise explained(error, self._place, self.where(), expected) from None
            except (ValueError, RecursionError) as error:
                raise explained(error, self._place, self.where(), expected) from None
            length = end - self.position
            if length > MAX_ROW_BYTES // 4:  # a character takes at most 4 bytes
                refuse_large_row(self.where(), len(self._text[self.position : end].encode()))
            self.position = end
            return value, length

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        is_near_the_end = error.pos >= len(self._text) - NUM_UNDECIDED or error.msg.startswith("Unterminated string")
        if self.has_ended or not is_near_the_end:
            return False
        refuse_large_row(self.where(), len(self._text) - self.position, at_least=True)
        return True

    def where(self) -> str:
        """Return the file and the line of `position`."""
        self._mark(self.position)
        return f"{self._name}:{self._line}"

    def _place(self, position: int) -> str:
        self._mark(position)
        return f"{self._name}:{self._line}:{self._column}"

    def _mark(self, position: int) -> None:
        self._line, self._column = _advanced(self._line, self._column, self._text, "\n", self._marked, position)
        self._marked = position

    def rest(self, num_characters: int) -> str:
        """Return some of what follows `position`."""
        return self._text[self.position : self.position + num_characters]


def _advanced(line: int, column: int, text: AnyStr, newline: AnyStr, begin: int, end: int) -> tuple[int, int]:
    """Return line and column of position `end` of a text, of which `begin` stands at `line` and `column`."""
    last = text.rfind(newline, begin, end)
    return (line, column + end - begin) if last < 0 else (line + text.count(newline, begin, end), end - last)


def _list_chunks(text: _GrowingText, stream: TextStream, chunk_bytes: int) -> Iterator[ParsedChunk]:
    parsed: list[Record] = []
    size = accounted = 0
    for record, length in _objects(text):
        parsed.append(record)
        size += length
        if size >= chunk_bytes:
            num_bytes = stream.num_bytes_read() - accounted
            yield ParsedChunk(tuple(parsed), num_bytes)
            parsed, size, accounted = [], 0, accounted + num_bytes
    if parsed:
        yield ParsedChunk(tuple(parsed), stream.num_bytes_read() - accounted)


def _objects(text: _GrowingText) -> Iterator[tuple[Record, int]]:
    """Yield (record, its length in characters) of each object of a list whose bracket was passed."""
    if text.next_character() == "]":
        text.position += 1
        _refuse_more(text)
        return
    while True:
        if text.next_character() == "]":
            raise DataError(
                f"{text.where()}: broken JSON: found a comma before the end of the list; expected an object"
            )
        where = text.where()
        value, length = text.value("expected a list of objects")
        if type(value) is not dict:
            raise DataError(f"{where}: found {kind_of(value)}; expected an object")
        yield Record(where, value), length
        mark = text.next_character()
        if mark not in (",", "]"):
            found = repr(mark) if mark else "the end of the file"
            raise DataError(f"{text.where()}: broken JSON: found {found}; expected a comma or the end of the list")
        text.position += 1
        if mark == "]":
            _refuse_more(text)
            return


def _refuse_more(text: _GrowingText) -> None:
    if text.next_character():
        found = repr(text.rest(20).rstrip())
        raise DataError(
            f"{text.where()}: broken JSON: found text after the list: {found}; expected the end of the file"
        )
