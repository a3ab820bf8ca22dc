"""Every kind of file gives the same records in chunks of any size; damaged files are refused."""

import csv
import gzip
import io
import itertools
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.config.schema import Source
from qlora_train.data.readers import read_chunks
from qlora_train.data.readers.chunk import MAX_ROW_BYTES
from qlora_train.data.sources import find_files
from qlora_train.data.types import Record
from qlora_train.utils.errors import DataError

ROWS = [{"prompt": "one\ntwo", "completion": ' "3"'}, {"prompt": "é, 😀\t\u2028", "completion": "four\r\nfive"}] * 40
CHUNK_BYTES = (1, 100, 1 << 20)


def records_of(path: Path | str, chunk_bytes: int = 1 << 20, **settings_: Any) -> list[Record]:
    """Read a source as a run does: each chunk goes to another process and comes from there."""
    found = []
    for file in find_files(Source(path=str(path), **settings_), "data.train"):
        for chunk in read_chunks(file, chunk_bytes=chunk_bytes):
            found += pickle.loads(pickle.dumps(chunk)).records()
    return found


def values_of(path: Path | str, chunk_bytes: int = 1 << 20, **settings_: Any) -> list[dict[str, Any]]:
    return [record.values for record in records_of(path, chunk_bytes, **settings_)]


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_table(rows: list[dict[str, Any]], dialect: str) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), dialect=dialect)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def as_arrow(rows: list[dict[str, Any]], writer: Callable[..., Any]) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    with writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=7)
    return bytes(sink.getvalue().to_pybytes())


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=30)
    return bytes(sink.getvalue().to_pybytes())


FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": as_lines,
    "a.JSONL": lambda rows: as_lines(rows).replace(b"\n", b"\r\n\r\n"),
    "a.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "line.json": lambda rows: json.dumps(rows).encode(),
    "lines.json": as_lines,
    "a.csv": lambda rows: as_table(rows, "excel"),
    "mark.csv": lambda rows: b"\xef\xbb\xbf" + as_table(rows, "unix"),
    "a.tsv": lambda rows: as_table(rows, "excel-tab"),
    "a.parquet": as_parquet,
    "a.arrow": lambda rows: as_arrow(rows, pyarrow.ipc.new_file),
    "stream.arrow": lambda rows: as_arrow(rows, pyarrow.ipc.new_stream),
    "a.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "members.jsonl.gz": lambda rows: gzip.compress(as_lines(rows[:9])) + gzip.compress(as_lines(rows[9:])),
    "a.json.zst": lambda rows: zstd(json.dumps(rows).encode()),
    "a.csv.gz": lambda rows: gzip.compress(as_table(rows, "excel")),
    "a.tsv.zst": lambda rows: zstd(as_table(rows, "excel-tab")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows_in_chunks_of_any_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name](ROWS))
    (file,) = find_files(Source(path=str(path)), "data.train")
    for chunk_bytes in CHUNK_BYTES:
        assert values_of(path, chunk_bytes) == ROWS
        sizes = [chunk.num_bytes for chunk in read_chunks(file, chunk_bytes=chunk_bytes)]
        assert path.stat().st_size - len(sizes) <= sum(sizes) <= path.stat().st_size, "bytes for the progress bar"


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.zst"])
def test_a_text_file_has_one_row_per_line(tmp_path: Path, suffix: str) -> None:
    content = "one\n\n  two \r\n \t\nthree\u2028\x85 four\rfive".encode()
    packed = {"txt": content, "txt.gz": gzip.compress(content), "txt.zst": zstd(content)}[suffix]
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(packed)
    expected = {1: "one", 3: "  two ", 5: "three\u2028\x85 four\rfive"}
    for chunk_bytes in CHUNK_BYTES:
        assert records_of(file, chunk_bytes) == [Record(f"{file}:{n}", {"text": text}) for n, text in expected.items()]


def test_chunks_have_about_the_requested_size(tmp_path: Path) -> None:
    rows = [{"text": f"{number:050d}"} for number in range(20_000)]
    for name in ("a.jsonl", "a.json", "a.csv", "small.parquet", "large.parquet", "large.arrow", "a.jsonl.gz"):
        if name.startswith("large"):
            write_in_one_batch(rows, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(FILES[name.replace("small", "a")](rows))
        (file,) = find_files(Source(path=str(tmp_path / name)), "data.train")
        sizes = [len(pickle.dumps(list(chunk.records()))) for chunk in read_chunks(file, chunk_bytes=100_000)]
        assert 5 < len(sizes) < 25, name
        assert max(sizes) < 500_000, name


def write_in_one_batch(rows: list[dict[str, Any]], path: Path) -> None:
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=len(rows))
        return
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def test_a_chunk_without_rows_is_small(tmp_path: Path) -> None:
    rows = [{"text": f"{number:050d}"} for number in range(5_000)]
    holding = []
    for name, content_of in FILES.items():
        (tmp_path / name).write_bytes(content_of(rows))
        (file,) = find_files(Source(path=str(tmp_path / name)), "data.train")
        sizes = [(len(pickle.dumps(chunk)), chunk.holds_rows) for chunk in read_chunks(file, chunk_bytes=100_000)]
        assert max([size for size, holds_rows in sizes if not holds_rows], default=0) < 2000, name
        holding += [name] * any(holds_rows for _, holds_rows in sizes)
    assert not {"a.jsonl", "lines.json", "a.parquet", "a.arrow", "stream.arrow"} & set(holding)


line_kinds = st.lists(st.sampled_from(["row", "blank", "pretty"]), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(kinds=line_kinds, chunk_bytes=st.integers(1, 200), ending=st.sampled_from(["\n", "\r\n"]), last=st.booleans())
def test_each_row_has_its_line_number_in_every_chunk(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], chunk_bytes: int, ending: str, last: bool
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"line": n}) if kind == "row" else " " * (kind == "pretty") for n, kind in enumerate(kinds, 1)]
    file.write_bytes((ending.join(lines) + ending * last).encode())
    numbers = [n for n, kind in enumerate(kinds, 1) if kind == "row"]
    assert records_of(file, chunk_bytes) == [Record(f"{file}:{n}", {"line": n}) for n in numbers]


def test_rows_are_located_by_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text":\n "one"},\n\n{"text": "two"},{"text":"three"}\n\n,\n{"text": "4"}]')
    (tmp_path / "a.csv").write_text('\ntext\n"one\none"\n\ntwo\n"three\n\n"\nfour')
    (tmp_path / "a.tsv").write_text('text\tid\n"one\none"\t1\ntwo\t2\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    expected = {"a.json": (2, 5, 5, 8), "a.csv": (3, 6, 7, 10), "a.tsv": (2, 4), "a.parquet": ("row 1", "row 2")}
    for name, numbers in expected.items():
        for chunk_bytes in CHUNK_BYTES:
            found = [record.where for record in records_of(tmp_path / name, chunk_bytes)]
            assert found == [f"{tmp_path / name}:{number}" for number in numbers]


def test_rows_of_parquet_files_are_numbered_per_file(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"{i}" for i in range(2500)]})
    for name in ("a", "b"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=700)
    places_ = [f"{tmp_path}/{name}.parquet:row {i + 1}" for name in ("a", "b") for i in range(2500)]
    for chunk_bytes in (300, 1 << 20):
        assert [record.where for record in records_of(tmp_path, chunk_bytes)] == places_


BROKEN = {
    "a.jsonl": ('{"text": "x"}\n', '{"text": "y" "z"}\n', r":31:14: broken JSON: Expecting ',' delimiter"),
    "b.jsonl": ('{"text": "x"}\n', '{"t": 1, "t": 2}\n', r':31: found the key "t" twice in one object'),
    "c.jsonl": ('{"text": "x"}\n', '{"t": -Infinity}\n', r":31: found -Infinity, which is not JSON"),
    "d.jsonl": ('{"text": "x"}\n', '{"t": "\udcff"}\n', r":31:8: found byte 0xff, which is not UTF-8"),
    "e.jsonl": ('{"text": "x"}\n', "[" * 100_000 + "\n", r":31: found JSON that is nested too deeply"),
    "f.jsonl": ('{"text": "x"}\n', '{"t": ' + "1" * 5000 + "}\n", r":31: found a number with too many digits"),
    "a.json": ('\n{"text": "x"},', '\n{"text": "y" "z"},', r":31:14: broken JSON: Expecting ',' delimiter"),
    "b.json": ('\n{"text": "x"},', '\n{"t": [{"u": 1, "u": 2}]},', r':31: found the key "u" twice in one object'),
    "c.json": ('\n{"text": "x"},', '\n{"é": 1}\n{"t": "\udcff"},', r":32:8: found byte 0xff, which is not UTF-8"),
    "d.json": ('\n{"text": "x"},', '\n{"text": "y"},,', r":31:15: broken JSON: Expecting value; expected"),
    "a.csv": ("x,y\n", "x\n", r":31: found 1 field; expected 2: x, y"),
    "b.csv": ("x,y\n", '"x"y,z\n', r""":31: broken CSV: ',' expected after '"'"""),
    "a.tsv": ("x\ty\n", "x\tz\ty\n", r":31: found 3 fields; expected 2: x, y"),
    "a.txt": ("some text\n", "é \udcc3 \n", r":31:4: found byte 0xc3, which is not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_located_in_every_chunk(tmp_path: Path, name: str) -> None:
    whole, broken, message = BROKEN[name]
    text = "[" * name.endswith(".json") + whole * (29 + name.endswith(("jsonl", "csv", "tsv", "txt"))) + broken + whole
    content = text.encode("utf-8", "surrogateescape")
    for chunk_bytes, compressed in itertools.product(CHUNK_BYTES, (False, True)):
        file = tmp_path / (name + ".gz" * compressed)
        file.write_bytes(gzip.compress(content) if compressed else content)
        with pytest.raises(DataError) as caught:
            records_of(file, chunk_bytes)
        assert str(caught.value).startswith(f"{file}{message}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_large_file_is_read_with_little_memory(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(FILES[name]([{"text": f"{number} " + "word " * 40} for number in range(60_000)]))
    (found,) = find_files(Source(path=str(file)), "data.train")
    tracemalloc.start()
    num_rows = sum(1 for chunk in read_chunks(found, chunk_bytes=1 << 18) for _ in chunk.records())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 60_000
    assert peak < 8 << 20 < 60_000 * 200


def test_a_row_group_of_large_rows_is_decoded_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    original = pyarrow.parquet.ParquetFile.iter_batches

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        for batch in original(self, *arguments, **options):
            decoded.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", recorded)
    rows = [{"text": chr(97 + number) * 500_000} for number in range(24)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values_of(tmp_path / "a.parquet") == rows
    assert max(decoded) < 1_100_000


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_the_size_of_a_row_is_counted_in_bytes(tmp_path: Path, name: str) -> None:
    for text in ("\U0001f600" * (MAX_ROW_BYTES // 4 - 100), "\U0001f600" * (MAX_ROW_BYTES // 4 + 1)):
        content = f"text\n{text}\n" if name == "a.csv" else json.dumps([{"text": text}], ensure_ascii=False)
        (tmp_path / name).write_text(content, encoding="utf-8")
        if len(text.encode()) < MAX_ROW_BYTES:
            assert values_of(tmp_path / name) == [{"text": text}]
        else:
            with pytest.raises(DataError, match="found a row of more than 8 MiB"):
                values_of(tmp_path / name)


def large_row(name: str, num_bytes: int) -> bytes:
    rows = [{"text": "a", "id": "1"}, {"text": "x" * num_bytes, "id": "1"}, {"text": "b", "id": "1"}]
    if name.endswith(".json"):
        return json.dumps(rows, indent=1).encode()
    return FILES[name](rows) if name.endswith((".parquet", ".arrow", "sv")) else b"\n" + as_lines(rows)


@pytest.mark.parametrize(
    ("name", "chunk_bytes"),
    [
        ("a.jsonl", 1 << 20),
        ("a.jsonl", 1 << 25),
        *((f"a.{kind}", 1 << 20) for kind in ("json", "csv", "parquet", "arrow")),
    ],
)
def test_a_row_beyond_the_limit_is_refused_with_its_location(tmp_path: Path, name: str, chunk_bytes: int) -> None:
    file = tmp_path / name
    file.write_bytes(large_row(name, MAX_ROW_BYTES - 4096))
    assert [len(values["text"]) for values in values_of(file, chunk_bytes)] == [1, MAX_ROW_BYTES - 4096, 1]
    file.write_bytes(large_row(name, 10_000_000))
    place = {"a.json": "6", "a.parquet": "row 2", "a.arrow": "row 2"}.get(name, "3")
    with pytest.raises(DataError, match=rf"{name}:{place}: found a row of more than 8 MiB; split it"):
        values_of(file, chunk_bytes)


def test_a_quote_that_does_not_end_is_located(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text,id\n"one,1\n' + "two,2\n" * 3_000_000)
    with pytest.raises(DataError, match=r"a.csv:2: found a row of more than 8 MiB; .* or quote that does not end"):
        values_of(file)


def damages(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "cut in the middle": content[:middle],
        "cut before the last byte": content[:-1],
        "cut after the start": content[:5],
        "text behind it": content + b"more",
        "other bytes inside": content[:middle] + b"\xff\xfe\xfd\xfc" * 4 + content[middle + 16 :],
    }


@pytest.mark.parametrize("damage", list(damages(b"")))
def test_damaged_gzip_data_is_refused(tmp_path: Path, damage: str) -> None:
    content = gzip.compress("".join(json.dumps({"text": os.urandom(20).hex()}) + "\n" for _ in range(5000)).encode())
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(damages(content)[damage])
    with pytest.raises(
        DataError, match=r"a.jsonl.gz: the compressed data is (cut short|damaged \(.*\)); expected a whole"
    ):
        values_of(file)


@pytest.mark.parametrize(
    "damage", ["cut in the middle", "cut before the last byte", "cut after the start", "text behind it"]
)
def test_damaged_zstd_data_is_refused(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(damages(zstd(as_lines(ROWS)))[damage])
    with pytest.raises(
        DataError, match=r"a.jsonl.zst: the compressed data is (cut short|damaged \(.*\)); expected a whole"
    ):
        values_of(file)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
@pytest.mark.parametrize("damage", ["cut in the middle", "cut before the last byte", "cut after the start"])
def test_a_file_of_columns_that_is_cut_short_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    file = tmp_path / name
    file.write_bytes(damages(FILES[name](ROWS))[damage])
    with pytest.raises(DataError, match=r"arrow: not a readable Arrow|parquet: not a readable Parquet") as caught:
        values_of(file)
    assert "\n" not in str(caught.value)


def test_an_arrow_stream_that_ends_between_two_batches_is_refused(tmp_path: Path) -> None:
    content = FILES["stream.arrow"](ROWS)
    with pyarrow.BufferReader(content) as source, pyarrow.ipc.open_stream(source) as reader:
        reader.read_next_batch()
        end_of_first = source.tell()
    assert pyarrow.ipc.open_stream(content[:end_of_first]).read_all().num_rows == 7
    (tmp_path / "a.arrow").write_bytes(content[:end_of_first])
    with pytest.raises(DataError, match=r"a.arrow: not a readable Arrow file"):
        values_of(tmp_path / "a.arrow")


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i} " * 20 for i in range(5000)]}), file)
    content = file.read_bytes()
    for begin in (4, 50, 2000):
        file.write_bytes(content[:begin] + b"\xff" * 20 + content[begin + 20 :])
        with pytest.raises(DataError, match=r"a.parquet: not a readable Parquet file") as caught:
            values_of(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*FILES, "a.txt"])
def test_a_corrupted_file_is_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """Overwrite, remove and insert random bytes; only `DataError` may result."""
    random = Random(name)
    whole = as_lines(ROWS) if name == "a.txt" else FILES[name](ROWS[:20])
    num_refused = 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            begin = random.randrange(len(content))
            inserted = random.choice([b"", b"\0", b'"', b"\n", b"\r", b"[", b"\xff", random.randbytes(8)])
            content[begin : begin + random.choice([0, 1, 8, 40])] = inserted
        (tmp_path / name).write_bytes(content)
        try:
            records_of(tmp_path / name, random.choice(CHUNK_BYTES))
        except DataError as error:
            num_refused += 1
            assert "\n" not in str(error)  # noqa: PT017
            assert str(error).startswith(f"{tmp_path / name}:")  # noqa: PT017
    assert num_refused or name == "a.txt"


TEXT = "; expected UTF-8 text: give the file the suffix of its kind"
FOREIGN = {
    "a.jsonl": (gzip.compress(b"{}"), f"found gzip data{TEXT}"),
    "a.json": (zstd(b"{}"), f"found zstd data{TEXT}"),
    "a.csv": (as_parquet(ROWS), f"found a Parquet file{TEXT}"),
    "a.txt": (FILES["a.arrow"](ROWS), f"found an Arrow file{TEXT}"),
    "b.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer; expected the file itself"),
    "c.jsonl": (b"\xfd7zXZ\0\0\4", "found xz data; expected text: unpack it"),
    "a.jsonl.gz": (zstd(b"{}"), r"the compressed data is damaged \(.*\); expected a whole gzip stream"),
    "b.jsonl.gz": (b'{"text": "a"}\n', r"the compressed data is damaged \(.*\); expected a whole gzip stream"),
    "a.jsonl.zst": (gzip.compress(b"{}"), r"the compressed data is damaged \(.*\); expected a whole zstd stream"),
    "a.parquet": (b'{"text": "a"}\n', r"not a readable Parquet file \(ArrowInvalid\)"),
    "a.arrow": (as_parquet(ROWS), r"not a readable Arrow file \(ArrowInvalid\)"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_than_its_suffix_is_refused(tmp_path: Path, name: str) -> None:
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        values_of(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    for name in ("a.jsonl", "a.json", "a.txt", "a.csv"):
        (tmp_path / name).write_bytes('{"text": "a"}\n'.encode(encoding))
        with pytest.raises(DataError, match=rf"{name}:1: found UTF-16 or UTF-32 text; expected UTF-8"):
            values_of(tmp_path / name)


def test_a_byte_order_mark_is_skipped_in_tables_and_text_and_refused_in_json(tmp_path: Path) -> None:
    for name, content in (("a.csv", "text\né\n"), ("a.tsv", "text\né\n"), ("a.txt", "é\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        for chunk_bytes in CHUNK_BYTES:
            assert values_of(tmp_path / name, chunk_bytes) == [{"text": "é"}]
    for name in ("b.jsonl", "b.json"):
        (tmp_path / name).write_text('{"text": "é"}\n', encoding="utf-8-sig")
        with pytest.raises(DataError, match=r":1: found a UTF-8 byte-order mark; expected UTF-8 without one"):
            values_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, b"") for name in (*FILES, "a.txt", "a.txt.gz")),
        ("a.json", b" [ \n] "),
        ("a.jsonl", b"\n \r\n"),
        ("a.csv", b"text\n"),
        ("a.csv", b"\xef\xbb\xbf"),
        ("a.parquet", pyarrow.table({"text": pyarrow.array([], "string")})),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),  # the time of day would make each process name it otherwise
    ],
)
def test_a_file_without_rows_gives_no_records(tmp_path: Path, name: str, content: Any) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        pyarrow.parquet.write_table(content, tmp_path / name)
    assert records_of(tmp_path / name) == []


def test_a_file_that_changes_or_disappears_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    (found,) = find_files(Source(path=str(file)), "data.train")
    (chunk,) = read_chunks(found, chunk_bytes=100)
    file.write_text("")
    with pytest.raises(DataError, match=r"a.jsonl: the file became shorter while it was read"):
        list(chunk.records())
    file.unlink()
    for read in (lambda: list(chunk.records()), lambda: list(read_chunks(found, chunk_bytes=100))):
        with pytest.raises(DataError, match=r"a.jsonl: cannot be read: No such file or directory$"):
            read()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_read_permission_is_one_line(tmp_path: Path) -> None:
    for name, content_of in FILES.items():
        (tmp_path / name).write_bytes(content_of(ROWS))
        (tmp_path / name).chmod(0)
        with pytest.raises(DataError, match=rf"{name}: cannot be read: Permission denied$"):
            values_of(tmp_path / name)


def test_columns_of_json_text_are_decoded_at_any_depth(tmp_path: Path) -> None:
    import datasets

    rows = [{"id": 1, "turns": [{"a": 1}, {"b": [None, "x"]}]}, {"id": 2, "turns": None}]
    features = datasets.Features(id=datasets.Value("int64"), turns=datasets.List(datasets.Json()))
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "a.parquet")
    assert values_of(tmp_path / "saved") == rows == list(saved)
    assert values_of(tmp_path / "a.parquet") == rows


def test_arrow_maps_are_objects_and_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    kind = pyarrow.list_(pyarrow.struct({"name": pyarrow.string(), "arguments": pyarrow.map_("string", "string")}))
    calls = [{"name": "weather", "arguments": {"city": "Oslo", "days": "2"}}, {"name": "now", "arguments": {}}]
    twice = [{"name": "weather", "arguments": [("city", "Oslo"), ("city", "Ulm")]}]
    for name in ("a.parquet", "a.arrow"):
        for rows, problem in (([calls, None], None), ([calls, twice], "duplicate")):
            table = pyarrow.table({"calls": pyarrow.array(rows, kind)})
            if name == "a.parquet":
                pyarrow.parquet.write_table(table, tmp_path / name)
            else:
                with pyarrow.ipc.new_file(tmp_path / name, table.schema) as out:
                    out.write_table(table)
            if problem is None:
                assert values_of(tmp_path / name) == [{"calls": calls}, {"calls": None}]
            else:
                with pytest.raises(DataError, match=rf"the column calls cannot be read: .*{problem}"):
                    values_of(tmp_path / name)


def test_dictionary_encoded_columns_are_read_from_any_batch(tmp_path: Path) -> None:
    words = [f"word {number % 5}" for number in range(30)]
    column = pyarrow.array(words).dictionary_encode()
    table = pyarrow.table({"text": column, "list": pyarrow.ListArray.from_arrays(list(range(31)), column)})
    for name, writer in (("a", pyarrow.ipc.new_file), ("b", pyarrow.ipc.new_stream)):
        with writer(tmp_path / f"{name}.arrow", table.schema) as out:
            out.write_table(table, max_chunksize=7)
        assert values_of(tmp_path / f"{name}.arrow", 1) == [{"text": word, "list": [word]} for word in words]


def test_a_time_that_python_cannot_hold_is_refused_with_its_column(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a"], "at": pyarrow.array([2**62], pyarrow.timestamp("s"))})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"a.arrow:row 1 .* the column at cannot be read: .*; leave the column out"):
        values_of(tmp_path / "a.arrow")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.tsv").write_text("text\ttext\na\tb\n")
    for name in ("a.parquet", "a.arrow", "a.tsv:1"):
        with pytest.raises(DataError, match=rf"{name}: found the header text, text; expected a different name"):
            values_of(tmp_path / name.removesuffix(":1"))


def test_a_tab_separated_table_keeps_its_commas(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text('prompt\tcompletion\na, b\t"c\td"\n')
    assert values_of(file) == [{"prompt": "a, b", "completion": "c\td"}]
