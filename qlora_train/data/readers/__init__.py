"""Files -> chunks of records, each record with its location ``file:line`` or ``file:row N``.

Readers are strict wherever a lenient one loses data in silence: duplicate keys, NaN, byte-order marks, UTF-16, streams
that are cut short. A problem of the file's structure raises at once, ``file:line[:column]: what was found; what is
expected``; whether a well-formed record can be used is decided later.
"""

from collections.abc import Callable, Iterator

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.chunk import Chunk
from qlora_train.data.readers.json_values import json_type
from qlora_train.utils.errors import DataError, first_line
from qlora_train.utils.lazy_import import import_function

__all__ = ["Chunk", "json_type", "read_chunks"]

READERS = {
    "jsonl": "json_lines:line_chunks",
    "txt": "json_lines:line_chunks",
    "json": "json_list:json_chunks",
    "csv": "csv_table:table_chunks",
    "tsv": "csv_table:table_chunks",
    "parquet": "parquet:parquet_chunks",
    "arrow": "arrow:arrow_chunks",
}
"""Module in this package and function that reads a kind of file, imported with the first such file."""


def read_chunks(file: DataFile, *, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file into chunks of about `chunk_bytes` in memory and at least one row, in order.

    Raises:
        DataError: the file cannot be read or is not what its name says; here, or when a chunk's records are read.
    """
    try:
        read: Callable[[DataFile, int], Iterator[Chunk]] = import_function(f"{__name__}.{READERS[file.kind]}")
        yield from read(file, chunk_bytes)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror or first_line(error)}") from None
