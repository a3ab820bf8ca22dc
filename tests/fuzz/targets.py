"""Fuzz targets: functions of bytes that may raise only our error class, and their initial corpora.

`scripts/fuzz.py` searches inputs by coverage with atheris; `tests/fuzz/test_fuzz.py` runs the same functions.
"""

import atexit
import datetime
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

from qlora_train.config import load_config
from qlora_train.config.objectives import DatasetType
from qlora_train.config.schema import DataSection
from qlora_train.config.writer import to_yaml
from qlora_train.data.data_file import DataFile
from qlora_train.data.formats import FORMATS, recognise
from qlora_train.data.readers import read_chunks
from qlora_train.data.selection import StoredTexts
from qlora_train.data.tokenize_chunk import ChunkTokenizer
from qlora_train.utils.errors import UserError

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
SMALLEST = b"model:\n  model_name_or_path: some/model\ndata:\n  train: rows.jsonl\n"
LOSS_ON = ("assistant", "last", "completion", "all")
TOO_LONG = ("drop", "refuse", "truncate", "keep_end", "keep_answer", "split")
DATASET_TYPES = get_args(DatasetType)
FOR_PREFERENCES = 3
"""The first settings of LOSS_ON and TOO_LONG, which preferences support."""
DAY = datetime.date(2026, 1, 1)


@cache
def workplace() -> Path:
    """Return a folder of this process, in memory if possible."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def written(name: str, content: bytes) -> Path:
    """Write a file and return its path."""
    path = workplace() / name
    path.write_bytes(content)
    return path


def yaml_file(data: bytes) -> None:
    """Read a config; a valid one is written out and read back to the same values."""
    try:
        config = load_config(written("run.yaml", data))
    except UserError as error:
        check_lines(error.problems)
        return
    assert load_config(written("again.yaml", to_yaml(config).encode())) == config


def overrides(data: bytes) -> None:
    """Read a config with overrides, one per line, as from a command line; bytes may be invalid UTF-8."""
    words = data.decode("utf-8", "surrogateescape").split("\n")
    try:
        load_config(written("smallest.yaml", SMALLEST), words)
    except UserError as error:
        check_lines(error.problems)


def jsonl_rows(data: bytes) -> None:
    """Read JSON lines down to tokens and masks; the first byte selects the settings."""
    choice, content = (data[0] if data else 0), data[1:]
    file = DataFile(written("rows.jsonl", content), "rows.jsonl", "jsonl")
    try:
        pieces = list(read_chunks(file, chunk_bytes=1 << 12))
        first = next((record for piece in pieces for record in piece.records()), None)
        if first is None:
            return
        train_on, choice = choice % len(LOSS_ON), choice // len(LOSS_ON)
        overflow, choice = choice % len(TOO_LONG), choice // len(TOO_LONG)
        dataset_type = DATASET_TYPES[choice % len(DATASET_TYPES)]
        if dataset_type != "language_modeling":
            train_on, overflow = train_on % FOR_PREFERENCES, overflow % FOR_PREFERENCES
        tokenize = tokenizer_of(recognise(first, "auto", {}, dataset_type), dataset_type, train_on, overflow)
        for number, piece in enumerate(pieces):
            result = tokenize((0, number == 0, piece))
            for example in result.examples(["rows.jsonl"]):
                assert len(example.loss_mask) == len(example.input_ids) > 0
            check_lines(result.dropped.counts)
    except UserError as error:
        check_lines(error.problems)


@cache
def tokenizer_of(format_name: str, dataset_type: DatasetType, train_on: int, overflow: int) -> ChunkTokenizer:
    """Return a row encoder for a format, with a pico tokenizer."""
    data = DataSection.model_validate(
        {"train": "rows.jsonl", "train_on": LOSS_ON[train_on], "overflow": TOO_LONG[overflow], "max_length": 64}
    )
    tokenizer = pico_tokenizer()
    return ChunkTokenizer(tokenizer, data, format_name, {}, DAY, StoredTexts(), len(tokenizer), dataset_type)


@cache
def pico_tokenizer() -> Any:
    """Return the tokenizer of pico models; its import takes seconds."""
    from tests.support.pico import build_tokenizer

    return build_tokenizer()


def check_lines(problems: Iterable[str]) -> None:
    """Check that errors and drop reasons are printable lines."""
    for problem in problems:
        assert problem.strip()
        assert problem.splitlines() == [problem], "a problem is one line"
        problem.encode("utf-8", "backslashreplace")


RIGHT_ROWS = (
    {"instruction": "Add", "input": "1 2", "output": "3", "system": "Short", "history": [["Hi", "Hello"]]},
    {"question": "What?", "context": "All of it", "answer": "That"},
    {"prompt": "one two", "completion": " three"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "s"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False},
                  {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    {"text": "no structure at all, and longer than a row may be: " + "word " * 60},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]},
)  # fmt: skip
"""A row of every usable shape."""
FOUND = (
    b'\x02{"question": "one?", "answ\\r": "1", "context": ["one", "two"]}\n',
    '\x02{"question": "one?", "answer\\u2028": "1"}\n{"a\x85b\x1b[31m": 1}\n'.encode(),
)
"""Found by fuzzing: column names that broke the single line of an error."""


def yaml_seeds() -> Iterator[bytes]:
    """Yield valid and invalid configs."""
    for folder in (DATA / "malformed_configs", ROOT / "configs", ROOT / "recipes"):
        yield from (path.read_bytes() for path in sorted(folder.rglob("*.yaml")))


def override_seeds() -> Iterator[bytes]:
    """Yield overrides."""
    yield from (b"train.learning_rate=1e-4", b"data.train=[a.jsonl, {path: b, weight: 2}]", b"lora.r=8\nlora.r=16")
    yield from (
        b"lora={r: 8}",
        b"model.rope_scaling={rope_type: yarn, factor: 2}",
        b"data.columns.prompt=question",
        b"x",
    )


def jsonl_seeds() -> Iterator[bytes]:
    """Yield valid and invalid data files, each after a byte that selects settings."""
    paths = sorted([*(DATA / "malformed").glob("*.jsonl"), *(ROOT / "data" / "examples").glob("*.jsonl")])
    for number, path in enumerate(path for path in paths if path.is_file()):
        yield bytes([number % 24]) + path.read_bytes()[:4000]
    yield from FOUND
    for number, row in enumerate(RIGHT_ROWS):
        yield bytes([number % 24]) + json.dumps(row).encode() + b"\n"


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], Iterator[bytes]]]] = {
    "yaml": (yaml_file, yaml_seeds),
    "overrides": (overrides, override_seeds),
    "jsonl": (jsonl_rows, jsonl_seeds),
}
"""Functions and initial corpora by name."""


def words_of(name: str) -> list[str]:
    """Return words of a target's inputs that a fuzzer would take long to find."""
    if name == "jsonl":
        columns = [column for it in FORMATS.values() for column in it.columns]
        roles = [
            "role",
            "content",
            "user",
            "assistant",
            "system",
            "tool",
            "from",
            "value",
            "human",
            "gpt",
            "tool_calls",
        ]
        return [f'"{word}"' for word in dict.fromkeys([*columns, *roles])] + [
            "null",
            "true",
            "1e999",
            '"\\ud800"',
            "[[",
            "}{",
        ]
    from qlora_train.config import RunConfig

    sections: dict[str, Any] = {section: spec.annotation for section, spec in RunConfig.model_fields.items()}
    keys = [f"{section}.{key}" for section, model in sections.items() for key in model.model_fields]
    return [
        *sections,
        *keys,
        *(key.partition(".")[2] + ": " for key in keys),
        "!!",
        "&a",
        "*a",
        "<<: ",
        "0x",
        "1e999",
        "\n  ",
    ]
