"""A chunk of a file, which every reader yields, and the checks that all readers share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

MAX_ROW_BYTES = 8 << 20
"""A larger row has lost its end, or belongs to a file of another kind."""
MAX_HEADER_CHARACTERS = 300
"""Characters of a header in an error message."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of a file. It can be sent to another process.

    Attributes:
        records: yields them; raises DataError if they are not well-formed or can no longer be read.
        num_bytes: bytes of the file that it accounts for; those of all chunks add up to about the file's size.
        holds_rows: it contains its rows; otherwise only their location in the file, and is small.
    """

    records: Callable[[], Iterator[Record]]
    num_bytes: int
    holds_rows: bool = False


def check_row_size(where: str, num_bytes: int) -> None:
    """Raise DataError if a row is larger than MAX_ROW_BYTES."""
    if num_bytes > MAX_ROW_BYTES:
        raise DataError(
            f"{where}: found a row of more than {MAX_ROW_BYTES >> 20} MiB; split it into several rows, or correct the line "
            "or quote that does not end"
        )


def check_column_names(names: Sequence[str], where: str) -> None:
    """Raise DataError if a column has no name, or two have the same."""
    if not all(name.strip() for name in names):
        raise DataError(
            f"{where}: found the header {header_text(names)}, in which a column has no name; expected a name for each "
            "(from pandas: to_csv(index=False))"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{where}: found the header {header_text(names)}; expected a different name for each column")


def header_text(names: Sequence[str]) -> str:
    """Join column names for an error message of one line."""
    text = ", ".join(names)
    shown = "".join(char if char.isprintable() else " " for char in text[:MAX_HEADER_CHARACTERS])
    return shown + "..." * (len(text) > MAX_HEADER_CHARACTERS)
