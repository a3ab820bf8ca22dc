"""Parquet files: a chunk names rows of one row group, or several small row groups."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.arrow_columns import MAX_BATCH_ROWS, one_line_errors, records_of
from qlora_train.data.readers.chunk import Chunk, check_column_names
from qlora_train.data.types import Record

MAX_CHUNKS_PER_GROUP = 32
"""A chunk decodes its row group from the beginning: cutting a group finer would cost more time than tokenising it."""
BUFFER_BYTES = 1 << 20


def parquet_chunks(file: DataFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a Parquet file."""
    size = file.path.stat().st_size
    if not size:
        return
    with one_line_errors(file, "Parquet"), _opened(file) as table:
        check_column_names(table.schema_arrow.names, file.name)
        metadata, first_row = table.metadata, 1
        for groups in _small_groups_together(metadata, chunk_bytes):
            total_rows = sum(metadata.row_group(index).num_rows for index in groups)
            total_bytes = max(1, _num_bytes(metadata, groups))
            num_chunks = max(1, min(total_bytes // chunk_bytes, MAX_CHUNKS_PER_GROUP))
            batch_rows = max(1, min(chunk_bytes * total_rows // total_bytes, MAX_BATCH_ROWS))  # bounds the memory
            chunk_rows = max(total_rows // num_chunks, 1)
            for begin in range(0, total_rows, chunk_rows):
                num_rows = min(chunk_rows, total_rows - begin)
                num_bytes = size * num_rows // metadata.num_rows
                yield Chunk(partial(_records, file, groups, begin, num_rows, first_row, batch_rows), num_bytes)
            first_row += total_rows


def _records(
    file: DataFile, groups: range, begin: int, num_rows: int, first_row: int, batch_rows: int
) -> Iterator[Record]:
    position, end = 0, begin + num_rows  # rows counted from the first group
    with one_line_errors(file, "Parquet"), _opened(file) as table:
        for batch in table.iter_batches(batch_size=batch_rows, row_groups=groups, use_threads=False):
            skipped = max(begin - position, 0)
            if skipped < batch.num_rows:
                rows = batch.slice(skipped, end - position - skipped)
                yield from records_of(rows, file.name, first_row + position + skipped)
            position += batch.num_rows
            if position >= end:
                return


def _small_groups_together(metadata: Any, chunk_bytes: int) -> Iterator[range]:
    begin = 0
    for end in range(1, metadata.num_row_groups + 1):
        if end == metadata.num_row_groups or _num_bytes(metadata, range(begin, end + 1)) > chunk_bytes:
            yield range(begin, end)
            begin = end


def _num_bytes(metadata: Any, groups: range) -> int:
    return sum(metadata.row_group(index).total_byte_size for index in groups)


def _opened(file: DataFile) -> Any:
    import pyarrow.parquet

    # pre_buffer or no buffer would read each column of a row group at once
    return pyarrow.parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=BUFFER_BYTES)
