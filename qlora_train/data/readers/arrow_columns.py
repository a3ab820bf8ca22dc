"""Rows of Arrow record batches as Python values, for Parquet and Arrow files."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from qlora_train.data.data_file import DataFile
from qlora_train.data.readers.chunk import MAX_ROW_BYTES, check_row_size
from qlora_train.data.readers.json_values import DECODER
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError, first_line

MAX_BATCH_ROWS = 1024


@contextlib.contextmanager
def one_line_errors(file: DataFile, kind: str) -> Iterator[None]:
    """Turn pyarrow's errors for a damaged file into a DataError of one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{file.name}: cannot be read: {error.strerror}") from None
        raise DataError(
            f"{file.name}: not a readable {kind} file ({type(error).__name__}); it is cut short, damaged or of another "
            "kind: copy or write it again"
        ) from None


def records_of(batch: Any, name: str, first_row: int) -> Iterator[Record]:
    """Yield the rows of a pyarrow.RecordBatch whose first row has the number `first_row` in the file `name`.

    Raises:
        DataError: a row is too large, or a value has no Python equivalent.
    """
    for begin in range(0, batch.num_rows, MAX_BATCH_ROWS):
        part = batch.slice(begin, MAX_BATCH_ROWS)
        number = first_row + begin
        if part.nbytes > MAX_ROW_BYTES:
            for row in range(part.num_rows):
                check_row_size(f"{name}:row {number + row}", part.slice(row, 1).nbytes)
        for row, values in enumerate(_rows_of(part, f"{name}:row {number}"), number):
            yield Record(f"{name}:row {row}", values)


def _rows_of(batch: Any, where: str) -> list[dict[str, Any]]:
    columns: dict[str, list[Any]] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            values = column.to_pylist(maps_as_pydicts="strict")
            decode = _json_decoder(field.type)
            columns[field.name] = values if decode is None else [decode(value) for value in values]
        except (ValueError, OverflowError, KeyError) as error:  # a time too large for Python, broken JSON, a key twice
            raise DataError(
                f"{where} or one of the {batch.num_rows - 1} rows after it: the column {field.name} cannot be read: "
                f"{first_line(error)}; leave the column out, or write it as text"
            ) from None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _json_decoder(kind: Any) -> Callable[[Any], Any] | None:
    """Return a decoder of the JSON text inside values of an Arrow type, None if it has none.

    `datasets` stores columns whose type differs by row as JSON text.
    """
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else DECODER.decode(value)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        inner = _json_decoder(kind.value_type)
        return inner and (lambda values: None if values is None else [inner(value) for value in values])
    if pyarrow.types.is_struct(kind):
        fields = {field.name: decode for field in kind if (decode := _json_decoder(field.type)) is not None}
        return _struct_decoder(fields) if fields else None
    return None


def _struct_decoder(fields: dict[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        return None if value is None else {**value, **{name: fields[name](value[name]) for name in fields}}

    return decode
