"""A piece of a file: what every reader makes, and the limit that every reader keeps to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

MEBIBYTE = 1 << 20
MAX_ROW_BYTES = 8 * MEBIBYTE
"""No row that can be trained on is larger; a row that is has lost its end, or is a file of another kind."""


class Chunk(Protocol):
    """Some records of a file that follow one another. It can be sent to another process."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the file that it accounts for; those of all chunks add up to the file's size, or a little less."""

    @property
    def holds_rows(self) -> bool:
        """Whether it is as large as its rows; otherwise it is only their place, and many can be kept."""

    def records(self) -> Iterator[Record]:
        """Yield the records, in order.

        Raises:
            DataError: the chunk is not well-formed, or can no longer be read.
        """


@dataclass(frozen=True, slots=True)
class ParsedChunk:
    """Records of a file whose rows cannot be told apart without reading it from its beginning."""

    parsed: tuple[Record, ...]
    num_bytes: int
    holds_rows: bool = True

    def records(self) -> Iterator[Record]:
        """Yield the records, in order."""
        return iter(self.parsed)


def refuse_large_row(where: str, num_bytes: int, *, at_least: bool = False) -> None:
    """Raise if a row is beyond `MAX_ROW_BYTES`.

    Args:
        where: the place of the row.
        num_bytes: its size.
        at_least: its end was not looked for.
    """
    if num_bytes <= MAX_ROW_BYTES:
        return
    size = f"more than {MAX_ROW_BYTES // MEBIBYTE} MiB" if at_least else f"{num_bytes / MEBIBYTE:.1f} MiB"
    raise DataError(
        f"{where}: found a row of {size}; expected at most {MAX_ROW_BYTES // MEBIBYTE} MiB: split it into several rows, "
        "or correct the line or quote that does not end"
    )
