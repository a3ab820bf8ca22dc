"""Streamed rows: an order that is a pure function of data and seed, from any row on, in any number of processes."""

import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from qlora_train.config.schema import DataSection
from qlora_train.data import prepare_data
from qlora_train.data import source_store as source_store_module
from qlora_train.data import streaming as stream_module
from qlora_train.data.streaming import RowStream
from qlora_train.data.types import Example
from qlora_train.utils.errors import DataError
from tests.support.pico import build_tokenizer

TOKENIZER = build_tokenizer()
NUM_ROWS = 300


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_store_module, "CHUNK_BYTES", 400)
    monkeypatch.setattr(stream_module, "WINDOW_CHUNKS", 5)


def write(path: Path, *, num_rows: int = NUM_ROWS, bad: int = 0) -> Path:
    rows = [{"prompt": "n ", "completion": str(number) if number >= bad else ""} for number in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream_of(*paths: Path, seed: int = 0, **settings: object) -> RowStream:
    data = DataSection.model_validate(
        {"train": [str(path) for path in paths], "streaming": True, "num_proc": 1, **settings}
    )
    stream = prepare_data(data, TOKENIZER, seed).train
    assert isinstance(stream, RowStream)
    return stream


def said(rows: list[Example]) -> list[str]:
    return [TOKENIZER.decode(row.input_ids[row.loss_mask], skip_special_tokens=True) for row in rows]


def test_an_epoch_holds_every_row_once_and_the_next_one_in_another_order(tmp_path: Path) -> None:
    rows = said(list(islice(stream_of(write(tmp_path / "a.jsonl")).rows(0), 2 * NUM_ROWS)))
    first, second = rows[:NUM_ROWS], rows[NUM_ROWS:]
    everything = Counter(str(number) for number in range(NUM_ROWS))
    assert Counter(first) == Counter(second) == everything
    assert first != second
    assert first != sorted(first, key=int)


@pytest.mark.parametrize("remembers", [True, False])
def test_a_stream_goes_on_at_any_row(tmp_path: Path, remembers: bool) -> None:
    file = write(tmp_path / "a.jsonl")
    whole = stream_of(file)
    rows = list(islice(whole.rows(0), 700))
    for start in (0, 1, 33, 299, 300, 599):
        again = stream_of(file)
        if remembers:
            again.counts = list(whole.counts)
        here = list(islice(again.rows(start), 50))
        assert [row.where for row in here] == [row.where for row in rows[start : start + 50]]
        assert [row.input_ids.tolist() for row in here] == [row.input_ids.tolist() for row in rows[start : start + 50]]


def test_a_remembering_stream_tokenises_nothing_that_lies_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl")
    whole = stream_of(file)
    list(islice(whole.rows(0), NUM_ROWS))
    again = stream_of(file)
    again.counts = list(whole.counts)
    tokenised: list[int] = []
    original = RowStream._record
    monkeypatch.setattr(
        RowStream, "_record", lambda self, window, count: (tokenised.append(window), original(self, window, count))
    )
    start = sum(rows for rows, _, _ in whole.counts[:3])
    next(again.rows(start))
    assert tokenised == [3]


def test_the_order_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", num_rows=50)]
    one, two = (list(islice(stream_of(*files, num_proc=num).rows(0), 500)) for num in (1, 2))
    assert [row.where for row in one] == [row.where for row in two]
    assert {row.where.partition(":")[0] for row in one} == {str(file) for file in files}


def test_seed_and_content_change_the_fingerprint_and_the_seed_the_order(tmp_path: Path) -> None:
    file, other = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", num_rows=299)
    streams = [stream_of(file), stream_of(file, seed=1), stream_of(other)]
    assert len({stream.fingerprint for stream in streams}) == 3
    assert stream_of(file).fingerprint == streams[0].fingerprint
    first, second = (said(list(islice(stream.rows(0), NUM_ROWS))) for stream in streams[:2])
    assert first != second


def test_too_many_bad_rows_stop_the_stream(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", bad=10)
    rows = stream_of(file, max_dropped=0.5).rows(0)
    assert len(set(said(list(islice(rows, NUM_ROWS - 10))))) == NUM_ROWS - 10
    with pytest.raises(
        DataError, match=r"data.train: \d+ of the first \d+ rows of the stream .*, data.max_dropped \(0\)"
    ):
        list(islice(stream_of(file, max_dropped=0.0).rows(0), NUM_ROWS))
    with pytest.raises(DataError, match="5 of the first 5 rows of the stream cannot be used"):
        stream_of(write(tmp_path / "b.jsonl", num_rows=5, bad=5), max_dropped=1.0)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(write(tmp_path / "a.jsonl").read_bytes()))
    with pytest.raises(DataError, match=r"a.jsonl.gz cannot be streamed, .* expected jsonl, txt, arrow or parquet"):
        stream_of(file)
