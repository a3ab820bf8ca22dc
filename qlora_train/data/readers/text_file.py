"""The bytes and lines of text files, plain or compressed; UTF-8 and nothing else."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qlora_train.data.readers.chunk import refuse_large_row
from qlora_train.data.sources import DataFile
from qlora_train.utils.errors import DataError, first_line

BLOCK_BYTES = 1 << 20
UTF8_BOM, UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
BOM_KINDS = ("csv", "tsv", "txt")
"""Kinds that programs for the desktop write with a byte-order mark, always; in JSON it is against the standard."""
CODECS = {"gz": ("gzip", b"\x1f\x8b"), "zst": ("zstd", b"\x28\xb5\x2f\xfd")}
"""Compression -> the name of its format, and how its data begins."""
FOREIGN = {
    **{magic: f"{name} data; expected text: give it the suffix .{suffix}" for suffix, (name, magic) in CODECS.items()},
    b"PAR1\x15": "a Parquet file; expected text: give it the suffix .parquet",
    b"ARROW1\0\0": "an Arrow file; expected text: give it the suffix .arrow",
    b"PK\x03\x04": "a zip archive (as spreadsheets are); expected text: unpack or export it",
    b"\xfd7zXZ\0": "xz data; expected text: unpack it",
    b"version https://git-lfs.": "a pointer of Git LFS; expected the file itself: fetch it with git lfs pull",
    b"\0\0\0\0": "zeros; expected text: the file was not written whole, copy it again",
}
"""Beginnings of files that are no text -> what was found."""
NUM_MAGIC_BYTES = 32


class TextStream:
    """The decompressed bytes of a file, from its beginning."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self._raw: IO[bytes] = file.path.open("rb")
        self._stream: Any = self._raw
        if file.compression:
            try:
                self._stream = self._decompressed(file)
            except BaseException:
                self._raw.close()
                raise

    def _decompressed(self, file: DataFile) -> Any:
        import pyarrow

        name, magic = CODECS[file.compression]
        start = self._raw.read(NUM_MAGIC_BYTES)
        self._raw.seek(0)
        if start and not start.startswith(magic):
            others = [other for other, beginning in CODECS.values() if start.startswith(beginning)]
            found = f"{others[0]} data" if others else f"no {name} data"
            raise DataError(
                f"{file.name}: found {found}; expected {name} data, as the suffix .{file.compression} says: give it the "
                "suffix of what it is"
            )
        return pyarrow.CompressedInputStream(self._raw, name) if start else self._raw

    def read(self, num_bytes: int) -> bytes:
        """Return so many bytes, fewer only at the end."""
        try:
            return bytes(self._stream.read(num_bytes))
        except OSError as error:
            if error.errno is not None:
                raise
            cut = "Truncated" in str(error)
            found = "is cut short" if cut else f"is damaged ({first_line(error)})"
            raise DataError(
                f"{self.file.name}: the compressed data {found}; expected a whole {CODECS[self.file.compression][0]} "
                "stream: copy or make the file again"
            ) from None

    def num_bytes_read(self) -> int:
        """Return how much of the file on disk has been read."""
        return self._raw.tell()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not self._raw:
            self._stream.close()
        self._raw.close()


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of a file.

    Attributes:
        content: its bytes.
        offset: where it begins in the decompressed file, in bytes.
        first_line: the number of its first line, from 1.
        num_bytes: bytes on disk that were read for it.
    """

    content: bytes
    offset: int
    first_line: int
    num_bytes: int


def blocks(file: DataFile, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield the lines of a text file in blocks of about `block_bytes`.

    Raises:
        DataError: it is not UTF-8 text, is damaged, or has a line that is too long to keep.
    """
    with contextlib.closing(TextStream(file)) as stream:
        rest = stream.read(max(block_bytes, NUM_MAGIC_BYTES))
        offset = refuse_other_encodings(file, rest)
        rest, line, accounted, more = rest[offset:], 1, 0, bool(rest)
        while more:
            data = stream.read(block_bytes)
            more = bool(data)
            end = rest.rfind(b"\n") + 1 if more else len(rest)
            if end:
                num_bytes = stream.num_bytes_read() - accounted
                yield Block(rest[:end], offset, line, num_bytes)
                accounted += num_bytes
                line, offset = line + rest.count(b"\n", 0, end), offset + end
            rest = rest[end:] + data
            _refuse_endless_line(f"{file.name}:{line}", rest, stream)


def _refuse_endless_line(where: str, start: bytes, stream: TextStream) -> None:
    if b"\n" in start:
        return
    size = len(start)
    with contextlib.suppress(DataError):
        refuse_large_row(where, size)
        return
    while data := stream.read(BLOCK_BYTES):  # how long it is helps to find out what it is
        length = data.find(b"\n")
        size += len(data) if length < 0 else length
        if length >= 0:
            break
    refuse_large_row(where, size)


def refuse_other_encodings(file: DataFile, start: bytes) -> int:
    """Return the length of a byte-order mark that may be skipped.

    Raises:
        DataError: the file's first bytes say that it is not UTF-8, has a mark that must not be there, or is no text.
    """
    for magic, found in FOREIGN.items():
        if start.startswith(magic):
            raise DataError(f"{file.name}: found {found}")
    if start.startswith(UTF16_BOMS) or b"\0" in start[:4]:
        raise DataError(f"{file.name}:1: found UTF-16 or UTF-32 text; expected UTF-8: save the file as UTF-8")
    if not start.startswith(UTF8_BOM):
        return 0
    if file.kind not in BOM_KINDS:
        raise DataError(
            f"{file.name}:1: found a UTF-8 byte-order mark; expected UTF-8 without one: save it as plain UTF-8"
        )
    return len(UTF8_BOM)


def numbered_lines(name: str, first_line: int, content: bytes) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its newline).

    Raises:
        DataError: a line is not UTF-8 or too long; those before it come first.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        yield from _decoded_one_by_one(name, first_line, content)
        return
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    yield from enumerate(lines, first_line)


def _decoded_one_by_one(name: str, first_line: int, content: bytes) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.split(b"\n"), first_line):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(f"{name}:{number}:{error.start + 1}", line[error.start]) from None


def not_utf8(where: str, byte: int) -> DataError:
    """Return what to say of a byte that is not UTF-8."""
    return DataError(f"{where}: found byte 0x{byte:02x}, which is not UTF-8; expected a UTF-8 file")


def read_range(path: Path, name: str, offset: int, num_bytes: int) -> bytes:
    """Return a part of a file.

    Raises:
        DataError: the file is shorter than it was.
    """
    with path.open("rb") as handle:
        handle.seek(offset, os.SEEK_SET)
        content = handle.read(num_bytes)
    if len(content) < num_bytes:
        raise DataError(f"{name}: the file became shorter while it was read; start again when it is whole")
    return content
