"""The bytes and lines of text files, plain or compressed; UTF-8 only."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.chunk import check_row_size
from qlora_train.utils.errors import DataError, first_line

BLOCK_BYTES = 1 << 20
CODECS = {"gz": "gzip", "zst": "zstd"}
UTF8_BOM, UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
BOM_KINDS = ("csv", "tsv", "txt")
"""Kinds that spreadsheets and editors write with a byte-order mark; the JSON standard forbids one."""
BINARY = {
    b"\x1f\x8b": "gzip data", b"\x28\xb5\x2f\xfd": "zstd data", b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive (as spreadsheets are)",
}  # fmt: skip
"""First bytes -> what was found."""
NOT_THE_DATA = {
    b"version https://git-lfs.": "a Git LFS pointer; expected the file itself: fetch it with git lfs pull",
    b"\xfd7zXZ\0": "xz data; expected text: unpack it",
    b"\0\0\0\0": "zeros; expected text: the file was not written whole, copy it again",
}
"""First bytes -> what was found and what to do, where another suffix would not help."""
MIN_BLOCK_BYTES = 32
"""Enough for the first block to show what a file is not."""


def read_blocks(file: DataFile, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[bytes, int]]:
    """Yield the decompressed bytes of a file in blocks, each with the bytes read from disk so far; the last block is empty.

    Raises:
        DataError: it is not UTF-8 text, or its compressed data is damaged.
    """
    with file.path.open("rb") as raw:
        stream: Any = raw
        if file.compression and raw.peek(1):
            import pyarrow

            stream = pyarrow.CompressedInputStream(raw, CODECS[file.compression])
        block = _read(stream, file, max(block_bytes, MIN_BLOCK_BYTES))
        _check_encoding(file, block)
        while block:
            yield block, raw.tell()
            block = _read(stream, file, block_bytes)
        yield b"", raw.tell()


def _read(stream: Any, file: DataFile, num_bytes: int) -> bytes:
    try:
        return bytes(stream.read(num_bytes))
    except OSError as error:
        if error.errno is not None:
            raise
        found = "is cut short" if "Truncated" in str(error) else f"is damaged ({first_line(error)})"
        raise DataError(
            f"{file.name}: the compressed data {found}; expected a whole {CODECS[file.compression]} stream: copy or make "
            "the file again, or correct its suffix"
        ) from None


def _check_encoding(file: DataFile, start: bytes) -> None:
    for magic, found in NOT_THE_DATA.items():
        if start.startswith(magic):
            raise DataError(f"{file.name}: found {found}")
    for magic, found in BINARY.items():
        if start.startswith(magic):
            raise DataError(f"{file.name}: found {found}; expected UTF-8 text: give the file the suffix of its kind")
    if start.startswith(UTF16_BOMS) or b"\0" in start[:4]:
        raise DataError(f"{file.name}:1: found UTF-16 or UTF-32 text; expected UTF-8: save the file as UTF-8")
    if start.startswith(UTF8_BOM) and file.kind not in BOM_KINDS:
        raise DataError(
            f"{file.name}:1: found a UTF-8 byte-order mark; expected UTF-8 without one: save it as plain UTF-8"
        )


class Block(NamedTuple):
    """Whole lines of a file, which begin at the byte `offset` of the decompressed file."""

    content: bytes
    offset: int
    first_line: int
    num_bytes: int  # read from disk for it


def line_blocks(file: DataFile, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield the lines of a text file in blocks of about `block_bytes`.

    Raises:
        DataError: it is not UTF-8 text, is damaged, or has a line beyond MAX_ROW_BYTES.
    """
    rest, line, offset, accounted = b"", 1, 0, 0
    for data, position in read_blocks(file, block_bytes):
        rest += data
        end = rest.rfind(b"\n") + 1 if data else len(rest)
        if end:
            yield Block(rest[:end], offset, line, position - accounted)
            line, offset, accounted = line + rest.count(b"\n", 0, end), offset + end, position
            rest = rest[end:]
        check_row_size(f"{file.name}:{line}", len(rest))


def numbered_lines(name: str, first_line: int, content: bytes) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its newline).

    Raises:
        DataError: a line is not UTF-8; those before it come first.
    """
    if first_line == 1:
        content = content.removeprefix(UTF8_BOM)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        begin = content.rfind(b"\n", 0, error.start) + 1
        yield from numbered_lines(name, first_line, content[:begin])
        raise not_utf8(name, content, error.start, first_line) from None
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    yield from enumerate(lines, first_line)


def not_utf8(name: str, content: bytes, position: int, first_line: int = 1) -> DataError:
    """Return the error for a byte that is not UTF-8."""
    line, column = first_line + content.count(b"\n", 0, position), position - content.rfind(b"\n", 0, position)
    return DataError(
        f"{name}:{line}:{column}: found byte 0x{content[position]:02x}, which is not UTF-8; expected a UTF-8 file"
    )
