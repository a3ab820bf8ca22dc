"""Files -> chunks of records, each record with its location ``file:line`` or ``file:row N``.

Readers are strict wherever a lenient one loses data in silence: duplicate keys, NaN, byte-order marks, UTF-16, streams
that are cut short. A problem of the file's structure raises at once, ``file:line[:column]: what was found; what is
expected``; whether a well-formed record can be used is decided later.
"""

from collections.abc import Callable, Iterator

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.arrow import arrow_chunks
from qlora_train.data.readers.chunk import Chunk
from qlora_train.data.readers.csv_table import table_chunks
from qlora_train.data.readers.json_lines import line_chunks
from qlora_train.data.readers.json_list import json_chunks
from qlora_train.data.readers.json_values import json_type
from qlora_train.data.readers.parquet import parquet_chunks
from qlora_train.utils.errors import DataError, first_line

__all__ = ["Chunk", "json_type", "read_chunks"]

READERS: dict[str, Callable[[DataFile, int], Iterator[Chunk]]] = {
    "jsonl": line_chunks,
    "txt": line_chunks,
    "json": json_chunks,
    "csv": table_chunks,
    "tsv": table_chunks,
    "parquet": parquet_chunks,
    "arrow": arrow_chunks,
}


def read_chunks(file: DataFile, *, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file into chunks of about `chunk_bytes` in memory and at least one row, in order.

    Raises:
        DataError: the file cannot be read or is not what its name says; here, or when a chunk's records are read.
    """
    try:
        yield from READERS[file.kind](file, chunk_bytes)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror or first_line(error)}") from None
