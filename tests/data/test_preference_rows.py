"""Preference pairs from file to example: tokens and labels of both answers, stored, cached, dropped and shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_train.config import DataSection
from qlora_train.data import PreparedData, prepare_data
from qlora_train.data.held_out_rows import load_rows, save_rows
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example
from qlora_train.utils.errors import DataError
from tests.support.pico import build_tokenizer
from tests.support.preference_pairs import sums, write_pairs

Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    tokenizer = build_tokenizer()

    def prepared(file: Path, *, dataset_type: Any = "preference", **settings: Any) -> PreparedData:
        section = DataSection.model_validate({"train": str(file), "cache_dir": str(tmp_path / "cache"), **settings})
        return prepare_data(section, tokenizer, 0, dataset_type=dataset_type)

    return prepared


def rows_of(data: PreparedData) -> Rows:
    assert isinstance(data.train, Rows)
    return data.train


def equal_tokens(one: Example, other: Example) -> bool:
    return np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.loss_mask, other.loss_mask)


def same(one: Example, other: Example) -> bool:
    return all(equal_tokens(a, b) for a, b in zip(one.sequences, other.sequences, strict=True))


def test_each_answer_has_the_tokens_and_labels_of_sft_on_it(tmp_path: Path, prepare: Prepare) -> None:
    pairs = rows_of(prepare(write_pairs(tmp_path / "pairs.jsonl", count=6)))
    for name, number in (("chosen", 0), ("rejected", 1)):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": row["prompt"], "completion": row[name]} for row in sums(6)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        alone = rows_of(prepare(file, dataset_type="language_modeling"))
        sequences = [pair.sequences[number] for pair in pairs]
        assert all(equal_tokens(*both) for both in zip(sequences, alone, strict=True))
    assert pairs.lengths.tolist() == [pair.num_tokens for pair in pairs]
    assert pairs.num_labels.tolist() == [pair.num_labels for pair in pairs]
    longest = [2 * max(len(each.input_ids) for each in pair.sequences) for pair in pairs]
    assert pairs.padded_lengths.tolist() == longest


def test_pairs_come_back_from_cache_and_run_folder(tmp_path: Path, prepare: Prepare) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", count=12)
    first, again = prepare(file, eval=0.5), prepare(file, eval=0.5)
    assert again.report.sources[0].cached
    assert first.fingerprint == again.fingerprint
    save_rows(tmp_path / "rows", first, first.fingerprint)
    stored = load_rows(tmp_path / "rows")
    assert len(first.eval) == len(stored.eval) > 0
    for expected, *others in zip(first.eval, again.eval, stored.eval, strict=True):
        assert expected.rejected is not None
        assert all(same(expected, other) for other in others)
        assert all(other.answer == expected.answer is not None for other in others)


def test_another_rejected_answer_is_another_row(tmp_path: Path, prepare: Prepare) -> None:
    [row] = sums(1)
    other = {**row, "rejected": [{"role": "assistant", "content": "something else"}]}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (row, other, row)))
    assert len(rows_of(prepare(file))) == 3
    assert len(rows_of(prepare(file, deduplicate=True))) == 2


def test_a_pair_is_dropped_if_either_answer_cannot_be_used(tmp_path: Path, prepare: Prepare) -> None:
    rows = sums(3)
    rows[1]["rejected"] = [{"role": "assistant", "content": "no " * 300}]
    rows[2]["rejected"] = rows[2]["chosen"]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(file, max_dropped=1.0, max_length=200)
    assert len(rows_of(data)) == 1
    assert data.report.sources[0].summary.dropped.counts == {
        "longer than data.max_length (200 tokens)": 1, "chosen and rejected do not differ in an answer": 1,
    }  # fmt: skip
    cut = rows_of(prepare(file, max_dropped=1.0, max_length=200, overflow="truncate"))
    assert [len(each.input_ids) for each in cut[1].sequences][1] == 200


def test_answers_that_a_cut_makes_equal_are_dropped(tmp_path: Path, prepare: Prepare) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "one ", "chosen": "two " * 60 + "a", "rejected": "two " * 60 + "b"}) + "\n")
    with pytest.raises(DataError, match="1 x chosen and rejected are equal"):
        prepare(file, max_length=32, overflow="truncate", max_dropped=1.0)


def test_the_report_counts_pairs_with_a_sequence_of_max_length(tmp_path: Path, prepare: Prepare) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", count=6)
    longest = [max(len(each.input_ids) for each in pair.sequences) for pair in rows_of(prepare(file))]
    cut = prepare(file, max_length=max(longest), overflow="truncate")
    assert cut.report.splits["data.train"].num_at_max_length == longest.count(max(longest))


def test_the_report_shows_both_answers_of_a_pair(tmp_path: Path, prepare: Prepare) -> None:
    shown = prepare(write_pairs(tmp_path / "pairs.jsonl", count=2)).report.first_rows
    assert [row.where.rpartition(" ")[2] for row in shown] == ["(chosen)", "(rejected)"] * 2
    trained = ["".join(text for text, is_trained in row.segments if is_trained) for row in shown]
    assert json.loads(trained[0].partition("<|")[0])["sum"].isdigit()
    assert trained[0] != trained[1]
