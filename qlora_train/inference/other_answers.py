"""Answers of a model elsewhere to the held-out rows, to compare with those of the run."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from qlora_train.data.types import Example
from qlora_train.utils.errors import ConfigError, DataError

RESERVED = {"base", "adapter", "merged", "where", "expected"}
"""Keys of answers.jsonl."""
NAME = re.compile(r"[A-Za-z0-9][\w.:-]*")
KEY = "answer"
_LINE = re.compile(r":(?:row )?(\d+)$")


def parse_answers(option: str) -> tuple[str, Path]:
    """Return name and file of an option `NAME=FILE`.

    Raises:
        ConfigError: not of this form, a name of our own, or no such file.
    """
    name, _, file = option.partition("=")
    if not NAME.fullmatch(name) or not file:
        raise ConfigError(f"--answers {option}: expected NAME=FILE, such as gpt-4o=answers.jsonl")
    if name in RESERVED:
        raise ConfigError(f"--answers {option}: the name {name} is taken; use another")
    if not Path(file).is_file():
        raise ConfigError(f"--answers {option}: {file} does not exist")
    return name, Path(file)


def read_answers(file: Path, rows: Sequence[Example]) -> list[str]:
    """Return the answers to `rows` from a file with a line {"answer": ...} for each line of the held-out file.

    Raises:
        DataError: a line is malformed, or there is none for a row.
    """
    with file.open(encoding="utf-8") as lines:
        answers = [_answer(f"{file}:{number}", line) for number, line in enumerate(lines, start=1)]
    return [answers[_index(row, file, len(answers))] for row in rows]


def _answer(where: str, line: str) -> str:
    try:
        answer = json.loads(line).get(KEY)
    except (ValueError, AttributeError):
        answer = None
    if not isinstance(answer, str):
        raise DataError(f'{where}: expected an object with the text of an answer: {{"{KEY}": "..."}}')
    return answer


def _index(row: Example, file: Path, num_answers: int) -> int:
    found = _LINE.search(row.where)
    number = int(found[1]) if found else 0
    if not 1 <= number <= num_answers:
        raise DataError(
            f"{file}: has {num_answers} lines, and none for the held-out row {row.where}; expected a line for each line of "
            "that file, in its order"
        )
    return number - 1
