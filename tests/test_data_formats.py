"""Files become rows, or one line that says what is wrong and where."""

import csv
import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_train.config import DataSection
from qlora_train.data import prepare_data
from qlora_train.data.formats import read_rows
from qlora_train.data.types import Row, Unusable
from qlora_train.errors import ConfigError, DataError
from tests.pico import build_tokenizer

MALFORMED = Path(__file__).parent / "data" / "malformed"
EXPECTED = sorted(MALFORMED.glob("*.expected"))
TOKENIZER = build_tokenizer()


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(**settings: Any) -> list[Row | Unusable]:
    data = DataSection(**settings)
    return list(read_rows(data.train, data, "data.train"))


def texts(rows: list[Row | Unusable]) -> list[str | None]:
    return [row.text for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda path: path.stem)
def test_malformed_data_gives_exactly_its_one_line(expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MALFORMED)
    with pytest.raises(DataError) as caught:
        prepare_data(DataSection(train=expected.stem, max_length=64), TOKENIZER, seed=0)
    assert str(caught.value) == expected.read_text().rstrip("\n")
    assert len(caught.value.problems) == 1


def test_every_malformed_file_has_its_message() -> None:
    files = {path.name for path in MALFORMED.iterdir() if path.suffix != ".expected"}
    assert files == {path.stem for path in EXPECTED}
    assert len(files) >= 20


def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "one\ntwo", "completion": ' "3"'}, {"prompt": "é, 😀", "completion": "four"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    write_jsonl(tmp_path / "lines.json", rows)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "lines.json", "a.csv", "a.parquet"):
        read = rows_of(train=str(tmp_path / name))
        assert [(row.prompt, row.text) for row in read if isinstance(row, Row)] == [
            (row["prompt"], row["completion"]) for row in rows
        ]


def test_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\r\n\n{"text": "two\u2028"}')
    (tmp_path / "a.json").write_text('[\n{"text":\n "one"},\n\n{"text": "two"}]')
    (tmp_path / "a.csv").write_text('text\n"one\none"\ntwo\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    places = {"a.jsonl": ("2", "4"), "a.json": ("2", "5"), "a.csv": ("2", "4"), "a.parquet": ("row 1", "row 2")}
    for name, (first, second) in places.items():
        file = tmp_path / name
        assert [row.where for row in rows_of(train=str(file))] == [f"{file}:{first}", f"{file}:{second}"]


def test_globs_folders_and_lists_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "README.md").write_text("not data")
    assert texts(rows_of(train=str(tmp_path))) == ["a", "b"]
    assert texts(rows_of(train=f"{tmp_path}/*.jsonl")) == ["a", "b"]
    assert texts(rows_of(train=[f"{tmp_path}/b.jsonl", {"path": f"{tmp_path}/a.jsonl"}])) == ["b", "a"]


def test_alpaca_becomes_a_conversation(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"instruction": "add", "input": "1 2", "output": "3"},
            {"instruction": "greet", "input": "", "output": "hi"},
            {"instruction": "bow", "input": None, "output": "ok"},
        ],
    )
    read = [list(row.messages) for row in rows_of(train=file) if isinstance(row, Row) and row.messages]
    assert read == [chat("add\n\n1 2", "3"), chat("greet", "hi"), chat("bow", "ok")]


def test_prompt_and_completion_lists_are_one_conversation_with_loss_on_the_completion(tmp_path: Path) -> None:
    turns = chat("a", "b", "c", "d")
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": turns[:3], "completion": turns[3:]}])
    (row,) = rows_of(train=file)
    assert isinstance(row, Row)
    assert (list(row.messages or ()), row.loss_from) == (turns, 3)


def test_renamed_columns_and_text_parts_are_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    turns = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": parts, "tool_calls": []}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "chat": turns}])
    (row,) = rows_of(train=file, columns={"messages": "chat"})
    assert isinstance(row, Row)
    assert list(row.messages or ()) == chat("hi", "hello")


def test_a_format_can_be_forced_where_columns_are_ambiguous(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "add", "output": "2", "text": "add 2"}])
    assert texts(rows_of(train=file, format="text")) == ["add 2"]


def test_an_unknown_renaming_is_refused_with_the_allowed_names() -> None:
    with pytest.raises(ConfigError, match=r"data.columns: 'question' is not a column .* allowed: prompt, completion"):
        rows_of(train="a.jsonl", format="prompt_completion", columns={"question": "prompt"})


@pytest.mark.parametrize(
    ("format_", "row", "expected"),
    [
        ("messages", {"m": chat("a", "b")}, Row("", messages=tuple(chat("a", "b")))),  # type: ignore[arg-type]
        ("prompt_completion", {"p": "a", "c": "b"}, Row("", prompt="a", text="b")),
        ("alpaca", {"i": "a", "x": "1", "o": "b"}, Row("", messages=tuple(chat("a\n\n1", "b")))),  # type: ignore[arg-type]
        ("text", {"t": "a"}, Row("", text="a")),
    ],
)
@pytest.mark.parametrize("forced", [True, False])
def test_columns_are_renamed_in_every_format(
    tmp_path: Path, format_: str, row: dict[str, Any], expected: Row, forced: bool
) -> None:
    names = {"messages": "m", "prompt": "p", "completion": "c", "instruction": "i", "input": "x", "output": "o"}
    columns = {column: name for column, name in {**names, "text": "t"}.items() if name in row}
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    read = rows_of(train=file, columns=columns, format=format_ if forced else "auto")
    assert read == [dataclasses.replace(expected, where=f"{file}:1")]


def test_a_renamed_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = [{"instruction": "add", "context": "1 2", "output": "3"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"^data.train: data.columns says that input is called contxt, but no row of"):
        rows_of(train=file, columns={"input": "contxt"})
    file = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "bow", "output": "ok"}, *rows])
    assert len(rows_of(train=file, columns={"input": "context"})) == 2


def test_a_renaming_that_the_recognised_format_does_not_use_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "add 2", "question": "add", "completion": "2"}])
    with caplog.at_level(logging.WARNING, "qlora_train"):
        rows_of(train=file, columns={"prompt": "qestion"})
    assert f"{file}:1: read as text, where data.columns {{prompt: qestion}} has no effect" in caplog.text


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    with pytest.raises(DataError, match=r"^data.train: .*trian\.jsonl does not exist; did you mean .*train\.jsonl\?"):
        rows_of(train=str(tmp_path / "trian.jsonl"))


def test_hub_settings_on_a_local_file_are_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    with pytest.raises(DataError, match="split has no effect on the local path"):
        rows_of(train={"path": file, "split": "test"})


def test_a_hub_data_set_without_network_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"^data.train: the Hub data set nobody/nothing\[train\] cannot be loaded"
    ) as caught:
        rows_of(train="nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_few_unusable_rows_are_counted_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": chat("hi", "" if i == 2 else f"hello {i}")} for i in range(10)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING, "qlora_train"):
        prepared = prepare_data(DataSection(train=file, max_dropped=0.1), TOKENIZER, seed=0)
    assert len(prepared.train) == 9
    assert prepared.dropped == {"data.train: empty assistant turn": 1}
    assert f"1 of 10 rows cannot be used and are left out: 1 x empty assistant turn ({file}:3)" in caplog.text


def test_dropped_rows_are_counted_by_where_they_were_read_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": ""}, {"text": None}, {"text": " "}])
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": ""}, {"text": "two"}, {"text": "two"}])
    with caplog.at_level(logging.INFO, "qlora_train"):
        prepared = prepare_data(DataSection(train=train, eval=held_out, max_dropped=0.9), TOKENIZER, seed=0)
    assert prepared.dropped == {
        "data.train: text is empty": 2,
        "data.train: text is null, expected a string": 1,
        "data.eval: text is empty": 1,
    }
    assert f"2 x text is empty ({train}:2, {train}:4); 1 x text is null, expected a string ({train}:3)" in caplog.text
    assert "data.eval: 2 rows (1 of them repeat an earlier one)" in caplog.text


def test_a_reason_is_one_short_line_whatever_the_row_says(tmp_path: Path) -> None:
    turns = [{"role": "hu\nman" + "x" * 5000, "content": "hi"}]
    rows = [{"messages": turns}, *({"messages": [{"role": f"r{i}", "content": "hi"}]} for i in range(30))]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare_data(DataSection(train=file), TOKENIZER, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 3000
    assert f"23 x other reasons ({file}:9, {file}:10" in message


def test_all_rows_unusable_is_an_error_even_where_every_drop_is_allowed(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match="no row can be used: 1 x text is empty"):
        prepare_data(DataSection(train=file, max_dropped=1.0), TOKENIZER, seed=0)


def test_the_split_keeps_its_sides_when_rows_are_added_and_equal_rows_together(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(200)]
    few = write_jsonl(tmp_path / "few.jsonl", rows[:100] + rows[:50])
    many = write_jsonl(tmp_path / "many.jsonl", rows[::-1])
    sides = []
    for file in (few, many):
        prepared = prepare_data(DataSection(train=file, eval=0.2), TOKENIZER, seed=3)
        train, held_out = ({TOKENIZER.decode(e.input_ids) for e in part} for part in (prepared.train, prepared.eval))
        assert not train & held_out
        sides.append(held_out)
    assert 10 <= len(sides[0]) <= 30
    assert sides[0] < sides[1]
    other = prepare_data(DataSection(train=many, eval=0.2), TOKENIZER, seed=4)
    assert {TOKENIZER.decode(e.input_ids) for e in other.eval} != sides[1]


def test_a_split_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "one"}])
    with pytest.raises(DataError, match=r"data.eval: a share of 0.1 of 2 rows leaves none"):
        prepare_data(DataSection(train=file, eval=0.1), TOKENIZER, seed=0)


def test_rows_in_train_and_eval_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": "three"}, {"text": "two"}])
    with caplog.at_level(logging.WARNING, "qlora_train"):
        prepared = prepare_data(DataSection(train=train, eval=held_out), TOKENIZER, seed=0)
    assert (len(prepared.train), len(prepared.eval)) == (2, 2)
    assert f"1 of 2 rows of data.eval stand in data.train too, so the evaluation flatters: {held_out}:2" in caplog.text


def test_the_fingerprint_changes_with_tokens_masks_and_order(tmp_path: Path) -> None:
    rows = [{"messages": chat("a", "b", "c", "d")}, {"messages": chat("e", "f")}]
    forward = write_jsonl(tmp_path / "a.jsonl", rows)
    backward = write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    prints = [
        prepare_data(DataSection(train=file, loss_on=loss_on), TOKENIZER, seed=0).fingerprint
        for file, loss_on in (
            (forward, "assistant"),
            (forward, "last"),
            (backward, "assistant"),
            (forward, "assistant"),
        )
    ]
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]


def test_the_data_stage_needs_no_torch_until_there_are_batches() -> None:
    code = "import sys, qlora_train.data; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
