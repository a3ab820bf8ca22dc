"""Records and turns for the tests of the formats, read as a run reads them."""

from typing import Any

import pytest

from qlora_train.config.objectives import DatasetType
from qlora_train.data.formats import recognise
from qlora_train.data.row_reader import RowReader
from qlora_train.data.types import Record, Row, UnusableRowError

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def chat(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def read(
    values: dict[str, Any],
    columns: dict[str, str] | None = None,
    format_name: str = "auto",
    dataset_type: DatasetType = "language_modeling",
) -> Row:
    record = Record("a.jsonl:1", values)
    return RowReader(recognise(record, format_name, columns or {}, dataset_type), columns or {}).read(record)


def turns_of(values: dict[str, Any], **options: Any) -> list[Any]:
    return list(read(values, **options).messages or ())


def reason_of(values: dict[str, Any]) -> str:
    with pytest.raises(UnusableRowError) as caught:
        read(values)
    return caught.value.reason


def call(name: str = "weather", arguments: Any = None, **others: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments or {}}, **others}


def calling(*calls: dict[str, Any], content: Any = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str = "21 degrees", **others: str) -> dict[str, str]:
    return {"role": "tool", "content": content, **others}
