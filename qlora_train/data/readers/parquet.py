"""Parquet files: small row groups are read by whoever reads the chunk, large ones are cut here, batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_train.data.readers.arrow_columns import MAX_BATCH_ROWS, explained, records_of
from qlora_train.data.readers.chunk import Chunk
from qlora_train.data.readers.csv_table import check_names
from qlora_train.data.sources import DataFile
from qlora_train.data.types import Record

MAX_CHUNKS_A_GROUP = 4
"""A row group that is larger than so many chunks is cut."""

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GroupChunk:
    """Row groups of a file.

    Attributes:
        file: the file.
        groups: the numbers of the row groups.
        first_row: the number of their first row in the file, from 1.
        num_bytes: bytes of the file that they account for.
    """

    file: DataFile
    groups: range
    first_row: int
    num_bytes: int
    holds_rows: bool = False

    def records(self) -> Iterator[Record]:
        """Yield the rows, in order."""
        number = self.first_row
        with explained(self.file, "Parquet"), _opened(self.file) as table:
            for batch in table.iter_batches(batch_size=MAX_BATCH_ROWS, row_groups=self.groups, use_threads=False):
                yield from records_of(batch, self.file.name, number)
                number += batch.num_rows


@dataclass(frozen=True, slots=True)
class BatchChunk:
    """Rows of a large row group, in Arrow's stream format."""

    name: str
    first_row: int
    num_bytes: int
    stream: bytes
    holds_rows: bool = True

    def records(self) -> Iterator[Record]:
        """Yield the rows, in order."""
        import pyarrow

        number = self.first_row
        with pyarrow.ipc.open_stream(pyarrow.BufferReader(self.stream)) as batches:
            for batch in batches:
                yield from records_of(batch, self.name, number)
                number += batch.num_rows


def parquet_chunks(file: DataFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a Parquet file."""
    size = file.path.stat().st_size
    if not size:
        return
    with explained(file, "Parquet"), _opened(file) as table:
        check_names(table.schema_arrow.names, file.name)
        bytes_a_row = size / max(table.metadata.num_rows, 1)
        first_row = 1
        for groups in _runs_of_groups(table.metadata, chunk_bytes):
            num_rows = sum(table.metadata.row_group(number).num_rows for number in groups)
            if _num_bytes(table.metadata, groups) > MAX_CHUNKS_A_GROUP * chunk_bytes:
                yield from _cut(file, table, groups[0], first_row, chunk_bytes, bytes_a_row)
            elif num_rows:
                yield GroupChunk(file, groups, first_row, int(num_rows * bytes_a_row))
            first_row += num_rows


def _runs_of_groups(metadata: Any, chunk_bytes: int) -> Iterator[range]:
    """Yield the numbers of all row groups, small ones together."""
    begin = 0
    for end in range(1, metadata.num_row_groups + 1):
        is_last = end == metadata.num_row_groups
        if is_last or _num_bytes(metadata, range(begin, end + 1)) > chunk_bytes:
            yield range(begin, end)
            begin = end


def _num_bytes(metadata: Any, groups: range) -> int:
    return sum(metadata.row_group(number).total_byte_size for number in groups)


def _opened(file: DataFile) -> Any:
    import pyarrow.parquet

    # without a buffer of its own each column of a row group is read whole
    return pyarrow.parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=BUFFER_BYTES)


def _cut(
    file: DataFile, table: Any, number: int, first_row: int, chunk_bytes: int, bytes_a_row: float
) -> Iterator[BatchChunk]:
    group = table.metadata.row_group(number)
    num_rows = min(max(chunk_bytes * group.num_rows // group.total_byte_size, 1), MAX_BATCH_ROWS)
    for batch in table.iter_batches(batch_size=num_rows, row_groups=[number], use_threads=False):
        yield BatchChunk(file.name, first_row, int(batch.num_rows * bytes_a_row), _as_stream(batch))
        first_row += batch.num_rows


def _as_stream(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())
