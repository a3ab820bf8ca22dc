"""Answers of a model elsewhere are matched with held-out rows by line, or refused with the line."""

from pathlib import Path
from typing import Any

import pytest

from qlora_train.inference import eval_report
from qlora_train.inference.other_answers import parse_answers, read_answers
from qlora_train.utils.errors import ConfigError, DataError


class Row:
    """A row at a place of its file."""

    def __init__(self, where: str) -> None:
        self.where = where


def rows(*places: str) -> Any:
    return [Row(place) for place in places]


def test_answers_are_those_of_the_rows_lines(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"answer": "one"}\n{"answer": ""}\n{"answer": "three", "id": 3}\n')
    assert read_answers(file, rows("held:out.jsonl:3", "held.parquet:row 1")) == ["three", "one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", 'answers.jsonl:1: expected an object with the text of an answer: {"answer": "..."}'),
        ('["a"]', "answers.jsonl:1: expected"),
        ('{"answer": 3}', "answers.jsonl:1: expected"),
        ("x", "answers.jsonl:1: expected"),
        ('{"answer": "a"}', "has 1 lines, and none for the held-out row rows.jsonl:2"),
    ],
)
def test_malformed_or_missing_answers_are_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        read_answers(file, rows("rows.jsonl:2"))
    assert message in str(caught.value)


@pytest.mark.parametrize("option", ["answers.jsonl", "adapter=a.jsonl", "a b=a.jsonl", "gpt=absent.jsonl", "=a.jsonl"])
def test_options_that_name_no_model_or_file_are_refused(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    assert parse_answers("gpt-4o=a.jsonl") == ("gpt-4o", Path("a.jsonl"))
    with pytest.raises(ConfigError, match=r"^--answers "):
        parse_answers(option)


@pytest.mark.parametrize("scores", [{}, {"field_f1": 0.5, "valid_json": 0.75}])
def test_table_has_no_column_without_a_value(scores: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    eval_report._print({"base": {"loss": 2.0}, "adapter": {"loss": 1.0, "exact_match": 0.5, **scores}}, 4)
    shown = capsys.readouterr().out
    assert "exact match" in shown
    assert ("field F1" in shown, "valid JSON" in shown) == (bool(scores), bool(scores))
