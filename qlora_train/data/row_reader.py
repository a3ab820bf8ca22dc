"""Records of one source -> rows, by the reader of its format."""

from collections.abc import Mapping
from dataclasses import replace

from qlora_train.data.column_hints import misspelled
from qlora_train.data.extra_columns import check_extra_columns, extra_columns
from qlora_train.data.formats import FORMATS
from qlora_train.data.pair_layouts import pair_records
from qlora_train.data.readers.chunk import header_text
from qlora_train.data.types import Record, Row
from qlora_train.utils.errors import DataError


class RowReader:
    """Reads the records of one source as rows.

    Args:
        name: a format, as `recognise` returns it.
        columns: the format's column names -> the file's; others are ignored.

    Attributes:
        unseen: renamed columns -> names in the file that no record so far had; at the end of a source, misspelled ones.
    """

    def __init__(self, name: str, columns: Mapping[str, str]) -> None:
        self.name = name
        self._format = FORMATS[name]
        self._read = self._format.reader()
        self._columns = self._format.file_columns(columns)
        self._extra = extra_columns(self._columns.values(), of_pairs=self._format.dataset_type == "preference")
        self._has_answers = name not in ("text", "tokens")
        self.unseen = {column: columns[column] for column in self._format.columns if column in columns}

    def split(self, record: Record) -> list[Record]:
        """Return a record for each row in one: a pair for each rejected answer."""
        return pair_records(record, self._columns["rejected"]) if "rejected" in self._format.required else [record]

    def read(self, record: Record) -> Row:
        """Return a record from `split` as a row.

        Raises:
            UnusableRowError: a value cannot be used.
            DataError: a required column is missing.
        """
        found = record.values
        if self.unseen:
            self.unseen = {column: in_file for column, in_file in self.unseen.items() if in_file not in found}
        values = {column: found[in_file] for column, in_file in self._columns.items() if in_file in found}
        for column in self._format.required:
            if column not in values:
                raise self._missing(record, column)
        warnings = check_extra_columns(found, self._extra, has_answers=self._has_answers)
        row = self._read(record.where, values)
        return replace(row, warnings=warnings) if warnings else row

    def _missing(self, record: Record, column: str) -> DataError:
        by_file_column = {in_file: column for column, in_file in self._columns.items()}
        values = {by_file_column.get(name, name): value for name, value in record.values.items()}
        nearest = misspelled(values, self._format.required).get(column)
        hint = f"; did you mean data.columns: {{{column}: {header_text([nearest])}}}?" if nearest else ""
        return DataError(
            f"{record.where}: the column {self._columns.get(column, column)} of the format {self.name} is missing; found "
            f"{header_text(list(record.values)) or 'none'}{hint}"
        )
