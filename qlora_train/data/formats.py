"""Records -> Rows: which format the columns are, and what a row of that format says.

Formats: `messages` (a list of {role, content}), `prompt_completion` (two strings, joined as they are, or two lists of
messages), `alpaca` (instruction, input, output: one user and one assistant turn) and `text`. The columns decide; where
they fit more than one format the file is refused, because a guess would train on the wrong half.

A missing column is an error at once: every row has it. A value that cannot be used makes its row unusable, with a
reason that does not quote the row, so that equal reasons can be counted.
"""

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_train.config.schema import DataSection, Source
from qlora_train.data.conversation import check_turns, read_string, read_turns
from qlora_train.data.readers import Record, read_records
from qlora_train.data.types import Message, Row, Unusable, UnusableRowError
from qlora_train.errors import ConfigError, DataError

log = logging.getLogger("qlora_train")


@dataclass(frozen=True, slots=True)
class Format:
    """A shape of rows: the columns that must be there, those that may, and the reader of one row."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    to_row: Callable[[str, Mapping[str, Any]], Row]


def read_rows(sources: Sequence[Source], data: DataSection, key: str) -> Iterator[Row | Unusable]:
    """Yield every row of `sources`, in order; a row that cannot be used comes as `Unusable`.

    Args:
        sources: entries of `data.train` or `data.eval`.
        data: its `format` and `columns` are used.
        key: ``data.train`` or ``data.eval``, for messages.

    Raises:
        ConfigError: `data.columns` renames a column that the format does not have.
        DataError: a source is missing, unreadable or not well-formed, or its columns fit no format, or several.
    """
    _check_renames(data)
    for source in sources:
        name: str | None = None
        unseen: dict[str, str] = {}
        for record in read_records(source, key):
            if name is None:
                name = _recognise(record, data)
                _log_recognised(record, name, data)
                unseen = {column: data.columns[column] for column in data.columns if column in _columns_of(name)}
            if unseen:
                unseen = {column: renamed for column, renamed in unseen.items() if renamed not in record.values}
            yield _read_row(record, name, data)
        for column, renamed in unseen.items():
            raise DataError(
                f"{key}: data.columns says that {column} is called {renamed}, but no row of {source.path} has a column "
                f"{renamed}; correct the name or remove it"
            )


def _read_row(record: Record, name: str, data: DataSection) -> Row | Unusable:
    try:
        return FORMATS[name].to_row(record.where, _values(record, name, data))
    except UnusableRowError as error:
        return Unusable.because(record.where, error)


def _check_renames(data: DataSection) -> None:
    names = [data.format] if data.format != "auto" else list(FORMATS)
    allowed = [column for name in names for column in _columns_of(name)]
    for column in data.columns:
        if column not in allowed:
            raise ConfigError(
                f"data.columns: {column!r} is not a column of the format {data.format}; allowed: {', '.join(allowed)} "
                "(the format's name comes first, then the file's)"
            )


def _recognise(record: Record, data: DataSection) -> str:
    if data.format != "auto":
        return data.format
    columns = data.columns
    fitting = [
        name
        for name, it in FORMATS.items()
        if all(columns.get(column, column) in record.values for column in it.required)
    ]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(record.values) or "none"
    if fitting:
        raise DataError(
            f"{record.where}: the columns {found} fit {' and '.join(fitting)}; set data.format to the one that is meant"
        )
    needs = ", or ".join(" + ".join(it.required) for it in FORMATS.values())
    raise DataError(f"{record.where}: found the columns {found}; expected {needs}{_rename_hint(record)}")


def _rename_hint(record: Record) -> str:
    wanted = [column for it in FORMATS.values() for column in it.required]
    for column in record.values:
        nearest = difflib.get_close_matches(column.lower(), wanted, n=1)
        if nearest:
            return f"; rename with data.columns: {{{nearest[0]}: {column}}}"
    return "; rename with data.columns, e.g. {prompt: question, completion: answer}"


def _log_recognised(record: Record, name: str, data: DataSection) -> None:
    used = {data.columns.get(column, column) for column in _columns_of(name)}
    unused = ", ".join(column for column in record.values if column not in used)
    log.info("%s: format %s%s", record.where, name, f"; columns not used: {unused}" * bool(unused))
    idle = ", ".join(
        f"{column}: {renamed}" for column, renamed in data.columns.items() if column not in _columns_of(name)
    )
    if idle:
        log.warning(
            "%s: read as %s, where data.columns {%s} has no effect; set data.format if another one is meant",
            record.where, name, idle,
        )  # fmt: skip


def _columns_of(name: str) -> tuple[str, ...]:
    return FORMATS[name].required + FORMATS[name].optional


def _values(record: Record, name: str, data: DataSection) -> dict[str, Any]:
    """Return the record's values under the format's own column names."""
    values = {}
    for column in _columns_of(name):
        in_file = data.columns.get(column, column)
        if in_file in record.values:
            values[column] = record.values[in_file]
        elif column in FORMATS[name].required:
            nearest = difflib.get_close_matches(in_file, record.values, n=1)
            hint = f"; did you mean data.columns: {{{column}: {nearest[0]}}}?" if nearest else ""
            found = ", ".join(record.values) or "none"
            raise DataError(
                f"{record.where}: the column {in_file} of the format {name} is missing; found {found}{hint}"
            )
    return values


def _conversation(where: str, turns: Sequence[Message], loss_from: int = 0) -> Row:
    check_turns(turns)
    return Row(where, messages=tuple(turns), loss_from=loss_from)


def _from_messages(where: str, values: Mapping[str, Any]) -> Row:
    return _conversation(where, read_turns(values["messages"], "messages"))


def _from_prompt_completion(where: str, values: Mapping[str, Any]) -> Row:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = read_turns(prompt, "prompt")
        return _conversation(where, turns + read_turns(completion, "completion"), loss_from=len(turns))
    text = read_string(completion, "completion")
    if not text.strip():
        raise UnusableRowError("completion is empty")
    return Row(where, text=text, prompt=read_string(prompt, "prompt"))


def _from_alpaca(where: str, values: Mapping[str, Any]) -> Row:
    question = read_string(values["instruction"], "instruction")
    extra = read_string("" if values.get("input") is None else values["input"], "input")
    turns: list[Message] = [
        {"role": "user", "content": f"{question}\n\n{extra}" if extra.strip() else question},
        {"role": "assistant", "content": read_string(values["output"], "output")},
    ]
    return _conversation(where, turns)


def _from_text(where: str, values: Mapping[str, Any]) -> Row:
    text = read_string(values["text"], "text")
    if not text.strip():
        raise UnusableRowError("text is empty")
    return Row(where, text=text)


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), (), _from_messages),
    "prompt_completion": Format(("prompt", "completion"), (), _from_prompt_completion),
    "alpaca": Format(("instruction", "output"), ("input",), _from_alpaca),
    "text": Format(("text",), (), _from_text),
}
