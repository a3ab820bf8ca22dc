"""A file of a data source."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a source, or a range of its rows.

    Attributes:
        path: the file.
        name: in messages: the path, or ``owner/name[split]`` for the Hub.
        kind: its suffix without the dot and the compression, in lower case.
        compression: ``gz``, ``zst`` or empty.
        begin: the first row of the range, from 0; only Arrow files have ranges.
        end: the row behind the range; None for all.
        first_row: the number of the first row in messages: a split of the Hub can have several files.
    """

    path: Path
    name: str
    kind: str
    compression: str = ""
    begin: int = 0
    end: int | None = None
    first_row: int = 1
