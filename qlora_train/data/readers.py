"""Files and Hub data sets -> records, one at a time, each with the place it stands at.

The JSON readers are our own because people need the line: ``file:line[:column]: what was found; what is expected``.
They are strict where a lenient reader loses data in silence: duplicate keys, NaN, byte-order marks, UTF-16. A problem
of the file's structure is an error at once; whether a well-formed record can be used is decided later.
"""

import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_train.config.schema import Source
from qlora_train.data.sources import local_files
from qlora_train.errors import DataError

UTF8_BOM, UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
ONE_OBJECT_A_LINE = "expected one JSON object a line (a list of objects is a .json file)"


@dataclass(frozen=True, slots=True)
class Record:
    """The columns of one row as the file has them, and where it stands."""

    where: str
    values: dict[str, Any]


def read_records(source: Source, key: str) -> Iterator[Record]:
    """Yield the records of one source, in the order of its files and rows.

    Args:
        source: one entry of `data.train` or `data.eval`.
        key: the setting it came from, for messages.

    Raises:
        DataError: something is missing, unreadable, empty or not well-formed.
    """
    files = local_files(source, key)
    if files is None:
        yield from read_hub(source, key)
        return
    for file in files:
        empty = True
        try:
            for record in READERS[file.suffix.lower()](file):
                empty = False
                yield record
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or _first_line(error)}") from None
        if empty:
            raise DataError(f"{file}: found no rows; expected at least one")


class _NotJSONError(ValueError):
    """JSON that the standard decoder would accept and lose something of."""


def _no_constant(name: str) -> Any:
    raise _NotJSONError(f"found {name}, which is not JSON; expected a number, a string or null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise _NotJSONError(f'found the key "{key}" twice in one object; expected it once')
        unique[key] = value
    return unique


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _lines(path: Path, *, bom: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its ending); a UTF-8 byte-order mark is skipped where `bom` allows it."""
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            line = raw
            if number == 1:
                _refuse_other_encodings(path, line, bom=bom)
                line = line.removeprefix(UTF8_BOM)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}:{error.start + 1}: found byte 0x{line[error.start]:02x}, which is not UTF-8; "
                    "expected a UTF-8 file"
                ) from None


def _refuse_other_encodings(path: Path, start: bytes, *, bom: bool) -> None:
    if start.startswith(UTF16_BOMS) or b"\0" in start[:4]:
        raise DataError(f"{path}:1: found UTF-16 or UTF-32 text; expected UTF-8: save the file as UTF-8")
    if start.startswith(UTF8_BOM) and not bom:
        raise DataError(f"{path}:1: found a UTF-8 byte-order mark; expected UTF-8 without one: save it as plain UTF-8")


def _read_jsonl(path: Path) -> Iterator[Record]:
    yield from _objects(path, _lines(path), ONE_OBJECT_A_LINE)


def _objects(path: Path, lines: Iterable[tuple[int, str]], expected: str) -> Iterator[Record]:
    for number, line in lines:
        if not line.strip():
            continue
        value = _decode(partial(DECODER.decode, line.rstrip("\r\n")), str(path), number, number, expected)
        yield _as_record(value, f"{path}:{number}", expected)


def _decode(decode: Callable[[], Any], path: str, text_line: int, value_line: int, expected: str) -> Any:
    """Run a JSON decoder on a text that begins at line `text_line`, for the value that begins at line `value_line`."""
    try:
        return decode()
    except json.JSONDecodeError as error:
        line, column = text_line + error.lineno - 1, error.colno
        raise DataError(f"{path}:{line}:{column}: broken JSON: {error.msg}; {expected}") from None
    except RecursionError:
        raise DataError(f"{path}:{value_line}: found JSON that is nested too deeply; {expected}") from None
    except ValueError as error:
        raise DataError(f"{path}:{value_line}: {error}") from None


def _as_record(value: Any, where: str, expected: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {kind_of(value)}; {expected}")
    return Record(where, value)


def kind_of(value: Any) -> str:
    """Name the type of a JSON value in JSON's words."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


SPACE = re.compile(r"[ \t\r\n]*")


def _read_json(path: Path) -> Iterator[Record]:
    """A list of objects; a file that does not begin with ``[`` is read as JSON lines, which often carry this suffix."""
    lines = _lines(path)
    head: list[tuple[int, str]] = []
    for numbered in lines:
        head.append(numbered)
        if numbered[1].strip():
            break
    everything = itertools.chain(head, lines)
    if not head or not head[-1][1].lstrip().startswith("["):
        yield from _objects(path, everything, "expected a list of objects, or one object a line")
        return
    yield from _list_of_objects(path, "".join(line for _, line in everything))


def _list_of_objects(path: Path, text: str) -> Iterator[Record]:
    begin = _skip_space(text, 0)
    position, line, counted = _skip_space(text, begin + 1), 1, 0
    if text[position : position + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        value, end = _decode(
            partial(DECODER.raw_decode, text, position), f"{path}", 1, line, "expected a list of objects"
        )
        yield _as_record(value, f"{path}:{line}", "expected an object")
        position = _skip_space(text, end)
        mark = text[position : position + 1]
        if mark == ",":
            position = _skip_space(text, position + 1)
            continue
        rest = text[position + 1 :].strip()
        if mark != "]" or rest:
            line += text.count("\n", counted, position)
            found = (
                f"text after the list: {rest[:20]!r}"
                if mark == "]"
                else (f"{mark!r}" if mark else "the end of the file")
            )
            raise DataError(f"{path}:{line}: broken JSON: found {found}; expected a comma or the end of the list")
        return


def _skip_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()


def _read_csv(path: Path) -> Iterator[Record]:
    """Comma-separated, with a header; a byte-order mark is allowed, since spreadsheets always write one."""
    line = 1
    limit = csv.field_size_limit(sys.maxsize)  # the csv module's limit is one for the process: put it back
    try:
        reader = csv.reader((line for _, line in _lines(path, bom=True)), strict=True)
        header = next(filter(None, reader), [])
        _check_names(header, f"{path}:{reader.line_num}")
        _check_commas(header, f"{path}:{reader.line_num}")
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise DataError(
                    f"{path}:{line}: found {len(fields)} fields; expected {len(header)}: {', '.join(header)}"
                )
            if fields:
                yield Record(f"{path}:{line}", dict(zip(header, fields, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: broken CSV: {error}; expected every quote closed, quotes inside doubled"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _check_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise DataError(f"{where}: found the header {', '.join(names)}; expected a different name for each column")


def _check_commas(header: Sequence[str], where: str) -> None:
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise DataError(
            f"{where}: found the header {header[0]!r} without a comma; expected commas between columns: save the file "
            "comma-separated"
        )


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}:row {number}", values)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({type(error).__name__}); write it again") from None


def read_hub(source: Source, key: str) -> Iterator[Record]:
    import datasets

    name = f"{source.path}[{source.split}]"
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec each raise their own kinds
        raise DataError(
            f"{key}: the Hub data set {name} cannot be loaded: {type(error).__name__}: {_first_line(error)}; check the "
            "name, subset, split and revision, the network, and `hf auth login` where access is gated"
        ) from None
    if len(rows) == 0:
        raise DataError(f"{key}: the Hub data set {name} has no rows; expected at least one")
    number = 0
    try:
        for values in rows:
            number += 1
            yield Record(f"{name}:row {number}", values)
    except Exception as error:  # decoding a picture or a sound needs libraries of its own
        raise DataError(
            f"{key}: row {number + 1} of the Hub data set {name} cannot be read: {type(error).__name__}: "
            f"{_first_line(error)}; save its text columns to a file and train from that"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".;")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
