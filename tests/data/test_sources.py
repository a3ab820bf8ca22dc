"""What lies at a path, in a folder or in a Hub repository is read as it is, or refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_train.config.schema import Source
from qlora_train.data.data_file import DataFile
from qlora_train.data.hub_datasets import hub_files
from qlora_train.data.readers import read_chunks
from qlora_train.data.sources import find_files
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

ROWS = [
    {"prompt": "one", "completion": "1", "topic": None, "score": 0.5},
    {"prompt": None, "completion": "2", "topic": "x", "score": None},
    {"prompt": "three", "completion": "3", "topic": "y", "score": 1.0},
]


def found(path: Path | str, **settings: Any) -> list[DataFile]:
    return find_files(Source(path=str(path), **settings), "data.train")


def records_of(files: list[DataFile]) -> list[Record]:
    return [record for file in files for chunk in read_chunks(file, chunk_bytes=1 << 16) for record in chunk.records()]


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def hub_records(folder: Path, **settings: Any) -> list[Record]:
    """Read a folder that is laid out like a repository on the Hub through the same call as a Hub id."""
    return records_of(hub_files(Source(path=str(folder), **settings), "data.train"))


def write_repository(folder: Path, **splits: list[list[dict[str, Any]]]) -> None:
    """Write each split as several Parquet files, as repositories of large data sets have them."""
    (folder / "data").mkdir(parents=True)
    for split, shards in splits.items():
        for number, rows in enumerate(shards):
            path = folder / "data" / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        *((f"a.{kind}", kind, "") for kind in ("jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow")),
        ("A.v2.JSONL", "jsonl", ""),
        ("a.jsonl.gz", "jsonl", "gz"),
        ("a.ndjson", "jsonl", ""),
        ("a.ndjson.zst", "jsonl", "zst"),
        ("a.csv.zst", "csv", "zst"),
    ],
)
def test_suffixes_say_what_a_file_is(tmp_path: Path, name: str, kind: str, compression: str) -> None:
    (tmp_path / name).touch()
    assert found(tmp_path / name) == [DataFile(tmp_path / name, str(tmp_path / name), kind, compression)]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.xlsx", ".xlsx"), ("a", "no suffix"), ("a.parquet.gz", ".parquet.gz"), ("a.gz", ".gz"), ("a.zip", ".zip")],
)
def test_other_suffixes_are_refused(tmp_path: Path, name: str, suffix: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"^data.train: .*{name} cannot be read: found {suffix}; expected \.jsonl, "):
        found(tmp_path / name)


def test_a_file_has_the_name_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path, name in (("a.jsonl", "a.jsonl"), ("./a.jsonl", "a.jsonl"), ("~/a.jsonl", f"{tmp_path}/a.jsonl")):
        assert [file.name for file in found(path)] == [name]


def test_globs_and_folders_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "deeper/c.jsonl", "README.md", ".hidden.jsonl"):
        (tmp_path / name).touch()
    expected = {tmp_path: "ab", f"{tmp_path}/*.jsonl*": "ab", f"{tmp_path}/**/*.jsonl": "bc"}
    for path, names in expected.items():
        assert "".join(file.path.name[0] for file in found(path)) == names


def test_a_folder_of_several_kinds_is_not_guessed_at(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl.gz", "LICENSE.txt"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=r"files of several kinds: LICENSE.txt, train-0.jsonl; name the files"
    ) as caught:
        found(tmp_path)
    assert str(caught.value).endswith(f"or a pattern such as {tmp_path}/*.jsonl")
    assert len(found(f"{tmp_path}/*.jsonl*")) == 2


def test_train_and_test_files_of_one_folder_are_not_read_as_one(tmp_path: Path) -> None:
    for name in ("test-0", "train-0", "train-1", "trainee"):
        (tmp_path / f"{name}.jsonl").touch()
    for place in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        with pytest.raises(
            DataError, match=r"holds files of several splits: test-0.jsonl, train-0.jsonl; name the one"
        ):
            found(place)
    assert len(found(f"{tmp_path}/train*.jsonl")) == 3


def test_a_folder_without_data_names_its_folders(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("")
    with pytest.raises(DataError, match=r"holds no data file: found README.md, data/; expected"):
        found(tmp_path)


def test_a_folder_with_the_suffix_of_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").mkdir()
    with pytest.raises(DataError, match=r"folder .*rows.parquet holds no data file: found no files"):
        found(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "rows.parquet" / "part-0.parquet")
    assert [record.values for record in records_of(found(tmp_path / "rows.parquet"))] == [{"text": "one"}]


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=r"^data.train: .*trian\.jsonl does not exist; did you mean .*train\.jsonl\?$"):
        found(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"no/a.jsonl does not exist; its folder .*no does not exist either$"):
        found(tmp_path / "no" / "a.jsonl")
    with pytest.raises(DataError, match=r"the pattern .*\*\.csv matches no file; check the folder and the suffix$"):
        found(tmp_path / "*.csv")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl is neither a file nor a folder \(a pipe or a device\)"):
        found(tmp_path / "rows.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root lists every folder")
def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match=r"^data.train: .*closed cannot be read: Permission denied$"):
        found(tmp_path / "closed")


@pytest.mark.parametrize("setting", [{"split": "test"}, {"subset": "en"}, {"revision": "main"}])
def test_hub_settings_on_a_local_file_are_refused(tmp_path: Path, setting: dict[str, str]) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=rf"^data.train: {next(iter(setting))} has no effect on the local path"):
        found(tmp_path / "train.jsonl", **setting)


@pytest.mark.parametrize("text", ["a b", "no thing/here", "owner/name:tag"])
def test_what_is_neither_a_file_nor_a_hub_id_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"is neither a file nor a Hub id; expected \.jsonl, .* or owner/name$"):
        found(text)


def test_a_hub_data_set_without_network_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"^data.train: the Hub data set nobody/nothing\[train\] is not in the local cache"
    ) as caught:
        found("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_hub_repository_is_read_by_split_with_nulls_and_further_columns(hub_cache: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    write_repository(repository, train=[ROWS[:2], ROWS[2:]], test=[ROWS[:1]])
    places = [f"{repository}[train]:row {number}" for number in (1, 2, 3)]
    assert hub_records(repository) == [Record(*each) for each in zip(places, ROWS, strict=True)]
    assert hub_records(repository, split="test") == [Record(f"{repository}[test]:row 1", ROWS[0])]
    with pytest.raises(
        DataError, match=r"^data.train: the Hub data set .*repo\[dev\] cannot be loaded: ValueError: .*dev"
    ):
        hub_records(repository, split="dev")


SLICES = (
    "train[:10%]",
    "train[7:33]",
    "train[-5:]",
    "train[30:]+test",
    "test[1:]+train[35:36]",
    "train[50%:51%]+test[:1]",
)


@pytest.mark.parametrize("split", SLICES)
def test_a_part_of_a_split_is_what_datasets_makes_of_it(hub_cache: Path, tmp_path: Path, split: str) -> None:
    import datasets

    rows = [{"text": f"row {number}"} for number in range(40)]
    write_repository(tmp_path / "repo", train=[rows[:9], rows[9:10], rows[10:]], test=[[{"text": "a"}, {"text": "b"}]])
    records = hub_records(tmp_path / "repo", split=split)
    assert [record.values for record in records] == list(datasets.load_dataset(str(tmp_path / "repo"), split=split))
    assert [record.where for record in records] == [
        f"{tmp_path / 'repo'}[{split}]:row {n + 1}" for n in range(len(records))
    ]


def test_pictures_of_a_hub_data_set_need_not_be_readable(hub_cache: Path, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "repo").mkdir()
    features = datasets.Features(text=datasets.Value("string"), picture=datasets.Image())
    rows = [{"text": "a", "picture": {"bytes": b"no picture", "path": None}}]
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "repo" / "train.parquet")
    assert [record.values["text"] for record in hub_records(tmp_path / "repo")] == ["a"]


def test_turns_of_differing_fields_come_from_the_hub_as_datasets_gives_them(hub_cache: Path, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "repo").mkdir()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    rows = [{"messages": turns}, {"messages": [{"role": "user", "content": ["part", {"type": "text"}]}]}]
    (tmp_path / "repo" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = list(datasets.load_dataset(str(tmp_path / "repo"), split="train"))
    assert [record.values for record in hub_records(tmp_path / "repo")] == expected


def test_a_folder_of_save_to_disk_is_read_by_split(tmp_path: Path) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS).select([2, 0, 1]), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards={"train": 3, "test": 1})
    files = found(tmp_path / "saved")
    assert [record.values for record in records_of(files)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert [file.name for file in files] == [f"{tmp_path}/saved/train/data-0000{n}-of-00003.arrow" for n in range(3)]
    (record,) = records_of(found(tmp_path / "saved", split="test"))
    assert record == Record(f"{tmp_path}/saved/test/data-00000-of-00001.arrow:row 1", ROWS[0])
    with pytest.raises(
        DataError, match=r"^data.train: .*saved has no split dev; found train, test; set split to the one"
    ):
        found(tmp_path / "saved", split="dev")
    with pytest.raises(DataError, match=r"^data.train: revision has no effect on the local path"):
        found(tmp_path / "saved", revision="main")


def test_a_saved_data_set_without_splits_is_read_whole(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [record.values for record in records_of(found(tmp_path / "saved"))] == ROWS
    with pytest.raises(DataError, match=r"^data.train: split has no effect on the local path .*saved; remove it$"):
        found(tmp_path / "saved", split="test")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow does not exist, but .*state.json lists it"):
        found(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": null}')
    with pytest.raises(DataError, match=r"state.json: found no list _data_files; expected what save_to_disk writes"):
        found(tmp_path / "saved")


@pytest.mark.parametrize("names", [("my-train.jsonl", "my-test.jsonl"), ("train/a.jsonl", "dev/a.jsonl")])
def test_splits_are_seen_anywhere_in_the_names_of_files_and_folders(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="holds files of several splits"):
        find_files(Source(path=f"{tmp_path}/**/*.jsonl"), "data.train")


def test_a_link_to_a_file_that_is_gone_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for place in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl"):
            [list(read_chunks(file, chunk_bytes=100)) for file in find_files(Source(path=place), "data.train")]
