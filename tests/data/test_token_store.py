"""Stored rows are read as they were written, from moved files and in any selection."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from qlora_train.data import token_store
from qlora_train.data.token_store import Rows, SourceSummary, Store
from tests.support.stores import example, rows_of, store_of

EXAMPLES = [
    example([5, 6, 7], [0, 1, 1], prompt=({"role": "user", "content": "é\u2028\n"},), answer="yes"),
    example([8], [0]),
    example([9, 999], [0, 1], prompt="plain ", answer="text"),
    example(list(range(300)), [0] * 299 + [1]),
    example([1, 2], [1, 0]),
]


@pytest.mark.parametrize("vocabulary_size", [1000, 1 << 16, (1 << 16) + 1])
def test_rows_are_read_as_they_were_written(tmp_path: Path, vocabulary_size: int) -> None:
    store = store_of(tmp_path / "store", EXAMPLES, vocabulary_size=vocabulary_size)
    rows = Rows.all_of([store])
    assert len(rows) == len(EXAMPLES)
    for number, (row, wanted) in enumerate(zip(rows, EXAMPLES, strict=True)):
        assert row.where == f"file.jsonl:{number + 1}"
        assert (row.input_ids.dtype, row.loss_mask.dtype) == (np.int32, np.bool_)
        assert row.input_ids.tolist() == wanted.input_ids.tolist()
        assert row.loss_mask.tolist() == wanted.loss_mask.tolist()
        assert (row.prompt, row.answer) == (wanted.prompt, wanted.answer)
    assert rows.lengths.tolist() == [3, 1, 2, 300, 2]
    assert rows.num_labels.tolist() == [2, 0, 1, 1, 1]
    summary = store.summary
    assert (summary.num_records, summary.num_rows, summary.num_tokens, summary.num_labels) == (5, 5, 308, 5)


def test_the_largest_token_ids_are_stored(tmp_path: Path) -> None:
    for name, vocabulary_size in (("small", 1 << 16), ("large", 300_000)):
        rows = Rows.all_of(
            [store_of(tmp_path / name, [example([vocabulary_size - 1], [0])], vocabulary_size=vocabulary_size)]
        )
        assert rows[0].input_ids.tolist() == [vocabulary_size - 1]


def test_chunks_are_joined_to_large_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_batches = []
    for min_bytes in (1, token_store.MIN_BATCH_BYTES):
        monkeypatch.setattr(token_store, "MIN_BATCH_BYTES", min_bytes)
        store = store_of(tmp_path / str(min_bytes), EXAMPLES)
        with pyarrow.ipc.open_file(tmp_path / str(min_bytes) / token_store.ROWS) as file:
            num_batches.append(file.num_record_batches)
        assert [row.input_ids.tolist() for row in Rows.all_of([store])] == [
            each.input_ids.tolist() for each in EXAMPLES
        ]
    assert num_batches == [2, 1]


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    assert len(rows_of(tmp_path / "store", [])) == 0
    assert len(Rows.all_of([])) == 0


def test_a_selection_over_several_stores_finds_each_row(tmp_path: Path) -> None:
    stores = [store_of(tmp_path / name, part) for name, part in (("a", EXAMPLES[:2]), ("e", []), ("b", EXAMPLES[2:]))]
    rows = Rows(stores, np.array([4, 0, 3, 3, 1, 2]))
    wanted = [EXAMPLES[i] for i in (4, 0, 3, 3, 1, 2)]
    assert [row.input_ids.tolist() for row in rows] == [each.input_ids.tolist() for each in wanted]
    assert rows.lengths.tolist() == [len(each.input_ids) for each in wanted]
    assert rows.store_indices.tolist() == [2, 0, 2, 2, 0, 2]
    assert rows[-1].input_ids.tolist() == wanted[-1].input_ids.tolist()
    assert [row.answer for row in rows[1:3]] == ["yes", None]
    with pytest.raises(IndexError):
        rows[6]


def test_locations_use_the_present_file_names(tmp_path: Path) -> None:
    store_of(tmp_path / "store", EXAMPLES)
    moved = Store(tmp_path / "store", ["elsewhere/renamed.jsonl"])
    assert moved.example(2).where == "elsewhere/renamed.jsonl:3"


def test_the_content_digest_changes_with_tokens_masks_and_borders(tmp_path: Path) -> None:
    variants = {
        "base": [example([1, 2, 3], [0, 1, 1])],
        "token": [example([1, 2, 4], [0, 1, 1])],
        "mask": [example([1, 2, 3], [0, 0, 1])],
        "border": [example([1, 2], [0, 1]), example([3], [1])],
    }
    digests = {name: store_of(tmp_path / name, rows).summary.content_sha256 for name, rows in variants.items()}
    assert len(set(digests.values())) == len(variants)
    assert store_of(tmp_path / "again", variants["base"]).summary.content_sha256 == digests["base"]


def test_a_summary_is_read_from_its_json() -> None:
    summary = SourceSummary(format="text", num_records=3)
    summary.dropped.add("too long", "a:1")
    assert SourceSummary.from_json(json.dumps(asdict(summary))) == summary
