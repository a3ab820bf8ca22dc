"""Arrow files, of the file or the stream format, read through a memory map."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.arrow_columns import MAX_BATCH_ROWS, one_line_errors, records_of
from qlora_train.data.readers.chunk import Chunk, check_column_names
from qlora_train.data.types import Record

FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""End of the stream format; without it a whole file cannot be told from the first half of one."""


def arrow_chunks(file: DataFile, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut an Arrow file."""
    import pyarrow

    size = file.path.stat().st_size
    if not size:
        return
    with one_line_errors(file, "Arrow"), pyarrow.memory_map(str(file.path)) as mapped:
        bytes_per_row = size / max(_num_rows(mapped), 1)
        first = 0  # row of the batch in the file
        for index, batch in _batches(mapped):
            check_column_names(batch.schema.names, file.name)
            batch.validate(full=True)  # the offsets of a damaged file point anywhere, and pyarrow does not check them
            begin = max(file.begin - first, 0)
            end = batch.num_rows if file.end is None else min(file.end - first, batch.num_rows)
            chunk_rows = min(max(chunk_bytes * batch.num_rows // max(batch.nbytes, 1), 1), MAX_BATCH_ROWS)
            for row in range(begin, end, chunk_rows):
                num_rows = min(chunk_rows, end - row)
                number = file.first_row + first + row - file.begin
                yield Chunk(partial(_records, file, index, row, num_rows, number), int(num_rows * bytes_per_row))
            first += batch.num_rows


def _records(file: DataFile, index: int, begin: int, num_rows: int, first_row: int) -> Iterator[Record]:
    import pyarrow

    with one_line_errors(file, "Arrow"), pyarrow.memory_map(str(file.path)) as mapped:
        yield from records_of(_batch(mapped, index).slice(begin, num_rows), file.name, first_row)


def count_rows(path: Path) -> int:
    """Return the number of rows of an Arrow file, without reading them."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        return _num_rows(mapped)


def _num_rows(mapped: Any) -> int:
    return sum(batch.num_rows for _, batch in _batches(mapped))


def _batches(mapped: Any) -> Iterator[tuple[int, Any]]:
    """Yield (index or offset, record batch)."""
    import pyarrow

    if _is_file_format(mapped):
        reader = pyarrow.ipc.open_file(mapped)
        yield from ((index, reader.get_batch(index)) for index in range(reader.num_record_batches))
        return
    mapped.seek(max(mapped.size() - len(END_OF_STREAM), 0))
    if mapped.read() != END_OF_STREAM:
        raise pyarrow.ArrowInvalid("no end of the stream")
    mapped.seek(0)
    stream = pyarrow.ipc.open_stream(mapped)
    offset = mapped.tell()
    for batch in stream:
        yield offset, batch
        offset = mapped.tell()


def _batch(mapped: Any, index: int) -> Any:
    import pyarrow

    if _is_file_format(mapped):
        return pyarrow.ipc.open_file(mapped).get_batch(index)
    schema = pyarrow.ipc.open_stream(mapped).schema
    if any("dictionary<" in str(kind) for kind in schema.types):  # a dictionary lies before its batches
        return next(batch for offset, batch in _batches(mapped) if offset == index)
    mapped.seek(index)
    return pyarrow.ipc.read_record_batch(pyarrow.ipc.read_message(mapped), schema)


def _is_file_format(mapped: Any) -> bool:
    mapped.seek(0)
    is_file = mapped.read(len(FILE_MAGIC)) == FILE_MAGIC
    mapped.seek(0)
    return bool(is_file)
