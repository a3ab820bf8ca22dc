"""What lies in a folder, a table or a Hub repository is read as it is, or refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_train.config import DataSection
from qlora_train.config.schema import Source
from qlora_train.data.formats import read_rows
from qlora_train.data.readers import Record, read_hub
from qlora_train.data.types import Row, Unusable
from qlora_train.errors import DataError

ROWS = [
    {"prompt": "one", "completion": "1", "topic": None, "score": 0.5},
    {"prompt": None, "completion": "2", "topic": "x", "score": None},
    {"prompt": "three", "completion": "3", "topic": "y", "score": 1.0},
]


def rows_of(**settings: Any) -> list[Row | Unusable]:
    data = DataSection(**settings)
    return list(read_rows(data.train, data, "data.train"))


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def hub_records(folder: Path, **settings: Any) -> Iterator[Record]:
    """Read a folder that is laid out like a repository on the Hub through the same call as a Hub id."""
    return read_hub(Source(path=str(folder), **settings), "data.train")


def test_a_hub_repository_is_read_by_split_with_nulls_and_further_columns(hub_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "repo" / "data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        file = tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert [record.values for record in hub_records(tmp_path / "repo")] == ROWS
    (record,) = hub_records(tmp_path / "repo", split="test")
    assert record == Record(f"{tmp_path / 'repo'}[test]:row 1", ROWS[0])
    with pytest.raises(DataError, match=r"^data.train: the Hub data set .*repo\[dev\] cannot be loaded: ValueError"):
        list(hub_records(tmp_path / "repo", split="dev"))


def test_conversations_from_the_hub_are_lists_of_turns_whose_empty_fields_are_left_out(
    hub_cache: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "repo").mkdir()
    rows = [{"messages": [turns[0], turns[1]]}, {"messages": [{**turns[0], "name": None}, turns[1]]}]
    (tmp_path / "repo" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = list(hub_records(tmp_path / "repo"))
    file = tmp_path / "again.jsonl"
    file.write_text("".join(json.dumps(record.values) + "\n" for record in records))
    named, plain = rows_of(train=str(file))
    assert isinstance(named, Unusable)
    assert named.reason == "a turn has the field name, which training would lose; expected role, content"
    assert isinstance(plain, Row)
    assert [turn["content"] for turn in plain.messages or ()] == ["hi", "hello"]


def test_a_hub_row_that_cannot_be_decoded_is_one_line(hub_cache: Path, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "repo").mkdir()
    features = datasets.Features(text=datasets.Value("string"), picture=datasets.Image())
    rows = [{"text": "a", "picture": {"bytes": b"no picture", "path": None}}]
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "repo" / "train.parquet")
    with pytest.raises(DataError, match=r"^data.train: row 1 of the Hub data set .* cannot be read: ") as caught:
        list(hub_records(tmp_path / "repo"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_folder_of_save_to_disk_is_refused_with_the_way_out(tmp_path: Path, as_dict: bool) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "one"}])
    (datasets.DatasetDict(train=rows) if as_dict else rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"was written by save_to_disk .* write a file with ") as caught:
        rows_of(train=str(tmp_path / "saved"))
    code = (
        str(caught.value).rpartition("write a file with ")[2].replace("'train.parquet'", f"'{tmp_path}/train.parquet'")
    )
    eval(code, {"datasets": datasets})
    assert [row.text for row in rows_of(train=f"{tmp_path}/train.parquet") if isinstance(row, Row)] == ["one"]


def test_train_and_test_files_of_one_folder_are_not_read_as_one(tmp_path: Path) -> None:
    for name in ("test-0", "train-0", "train-1", "trainee"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "' + name + '"}\n')
    for place in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        with pytest.raises(
            DataError, match=r"holds files of several splits: test-0.jsonl, train-0.jsonl; name the one"
        ):
            rows_of(train=place)
    assert len(rows_of(train=f"{tmp_path}/train*.jsonl")) == 3


def test_a_folder_without_data_names_its_folders(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("")
    with pytest.raises(DataError, match=r"holds no data file: found README.md, data/; expected"):
        rows_of(train=str(tmp_path))


def test_parquet_rows_are_counted_over_batches_and_files(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"{i}" for i in range(2500)]})
    for name in ("a", "b"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=700)
    rows = [row for row in rows_of(train=str(tmp_path)) if isinstance(row, Row)]
    places = [f"{tmp_path}/{name}.parquet:row {i + 1}" for name in ("a", "b") for i in range(2500)]
    assert [row.where for row in rows] == places
    assert [row.text for row in rows] == [str(i) for i in range(2500)] * 2


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: found the header text, text; expected a different name"):
        rows_of(train=str(tmp_path / "a.parquet"))


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i} " * 20 for i in range(5000)]}), file)
    content = file.read_bytes()
    for begin in (4, 50, 2000):
        file.write_bytes(content[:begin] + b"\xff" * 20 + content[begin + 20 :])
        with pytest.raises(DataError, match=r"a.parquet: ") as caught:
            rows_of(train=str(file))
        assert "\n" not in str(caught.value)


def test_csv_keeps_its_lines_with_a_mark_quoted_newlines_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'\xef\xbb\xbf\r\nprompt,completion\r\n"a\r\n\r\nb","say ""hi"", ok"\r\n\r\n' + "é,\u2028 x".encode() + b"\r\n"
    )
    assert rows_of(train=str(file)) == [
        Row(f"{file}:3", prompt="a\r\n\r\nb", text='say "hi", ok'),
        Row(f"{file}:7", prompt="é", text="\u2028 x"),
    ]


def test_a_json_file_is_opened_once_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = Path.open

    def counting(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", counting)
    for content in ('\n\n{"text": "a"}\n{"text": "b"}', '\n [{"text": "a"},\n{"text": "b"}]'):
        file = tmp_path / "a.json"
        file.write_text(content)
        opened.clear()
        assert [row.text for row in rows_of(train=str(file)) if isinstance(row, Row)] == ["a", "b"]
        assert opened == [file]
