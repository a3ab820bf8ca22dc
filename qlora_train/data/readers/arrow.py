"""Arrow files, of the file or the stream format: batches of rows that whoever reads the chunk finds by their place."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.data.readers.arrow_columns import MAX_BATCH_ROWS, explained, records_of
from qlora_train.data.readers.csv_table import check_names
from qlora_train.data.sources import DataFile
from qlora_train.data.types import Record

FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""What the stream format ends with; without it nobody can tell a whole file from the first half of one."""


@dataclass(frozen=True, slots=True)
class ArrowChunk:
    """Rows of one batch of a file.

    Attributes:
        file: the file.
        batch: the number of the batch in the file format, the offset of its bytes in the stream format.
        begin: the first row that is meant, in the batch.
        num_rows: how many are.
        first_row: the number that people give to the first one.
        num_bytes: bytes of the file that they account for.
    """

    file: DataFile
    batch: int
    begin: int
    num_rows: int
    first_row: int
    num_bytes: int
    holds_rows: bool = False

    def records(self) -> Iterator[Record]:
        """Yield the rows, in order."""
        with explained(self.file, "Arrow"), _opened(self.file.path) as arrow:
            batch = arrow.batch(self.batch).slice(self.begin, self.num_rows)
            yield from records_of(batch, self.file.name, self.first_row)


def arrow_chunks(file: DataFile, chunk_bytes: int) -> Iterator[ArrowChunk]:
    """Cut an Arrow file."""
    size = file.path.stat().st_size
    if not size:
        return
    with explained(file, "Arrow"), _opened(file.path) as arrow:
        check_names(arrow.schema.names, file.name)
        bytes_a_row = size / max(arrow.num_rows, 1)
        first = 0  # row of a batch in the file
        for place, batch in arrow.batches():
            batch.validate(full=True)  # offsets of a damaged file point anywhere, and nothing checks them later
            begin = max(file.begin - first, 0)
            end = batch.num_rows if file.end is None else min(file.end - first, batch.num_rows)
            rows_a_chunk = min(max(chunk_bytes * batch.num_rows // max(batch.nbytes, 1), 1), MAX_BATCH_ROWS)
            for row in range(begin, end, rows_a_chunk):
                num_rows = min(rows_a_chunk, end - row)
                number = file.first_row + first + row - file.begin
                yield ArrowChunk(file, place, row, num_rows, number, int(num_rows * bytes_a_row))
            first += batch.num_rows


def count_rows(path: Path) -> int:
    """Return how many rows an Arrow file has, without reading them."""
    with _opened(path) as arrow:
        return arrow.num_rows


class _ArrowFile:
    """The batches of an open Arrow file, by place; they lie in mapped memory, which the system can take back."""

    def __init__(self, mapped: Any) -> None:
        import pyarrow

        self._mapped = mapped
        self._is_stream = mapped.read(len(FILE_MAGIC)) != FILE_MAGIC
        if self._is_stream:
            mapped.seek(max(mapped.size() - len(END_OF_STREAM), 0))
            if mapped.read() != END_OF_STREAM:
                raise pyarrow.ArrowInvalid("no end of the stream")
        self._reader: Any = None if self._is_stream else pyarrow.ipc.open_file(mapped)
        self.schema: Any = (self._reader or self._stream()).schema

    def _stream(self) -> Any:
        import pyarrow

        self._mapped.seek(0)
        return pyarrow.ipc.open_stream(self._mapped)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return sum(batch.num_rows for _, batch in self.batches())

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield (place, batch), in order."""
        if not self._is_stream:
            yield from ((number, self._reader.get_batch(number)) for number in range(self._reader.num_record_batches))
            return
        stream = self._stream()
        place = self._mapped.tell()
        for batch in stream:
            yield place, batch
            place = self._mapped.tell()

    def batch(self, place: int) -> Any:
        """Return the batch of a place."""
        import pyarrow

        if not self._is_stream:
            return self._reader.get_batch(place)
        if any("dictionary<" in str(kind) for kind in self.schema.types):  # which lies before the batch
            return next(batch for there, batch in self.batches() if there == place)
        self._mapped.seek(place)
        return pyarrow.ipc.read_record_batch(pyarrow.ipc.read_message(self._mapped), self.schema)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_ArrowFile]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        yield _ArrowFile(mapped)
