"""Unpaired preferences from file to example: labels, counted reasons, advice for other rows, and the balance of labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_train.config import DataSection
from qlora_train.data import PreparedData, prepare_data
from qlora_train.data.held_out_rows import load_rows, save_rows
from qlora_train.data.label_balance import imbalance
from qlora_train.data.token_store import Rows
from qlora_train.data.types import UnusableRowError
from qlora_train.data.unpaired_rows import read_label
from qlora_train.utils.errors import DataError
from tests.support.pico import build_tokenizer
from tests.support.preference_pairs import write_pairs
from tests.support.unpaired_rows import labelled, write_labelled

Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    tokenizer = build_tokenizer()

    def prepared(file: Path, *, dataset_type: Any = "unpaired_preference", **settings: Any) -> PreparedData:
        section = DataSection.model_validate({"train": str(file), "cache_dir": str(tmp_path / "cache"), **settings})
        return prepare_data(section, tokenizer, 0, dataset_type=dataset_type)

    return prepared


def rows_of(data: PreparedData) -> Rows:
    assert isinstance(data.train, Rows)
    return data.train


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tokens_and_masks_are_those_of_sft_with_a_label_each(tmp_path: Path, prepare: Prepare) -> None:
    rows = rows_of(prepare(write_labelled(tmp_path / "rows.jsonl", count=6)))
    plain = [{name: row[name] for name in ("prompt", "completion")} for row in labelled(6)]
    alone = rows_of(prepare(written(tmp_path / "sft.jsonl", *plain), dataset_type="language_modeling"))
    for row, other, source in zip(rows, alone, labelled(6), strict=True):
        assert np.array_equal(row.input_ids, other.input_ids)
        assert np.array_equal(row.loss_mask, other.loss_mask)
        assert row.desirable is source["label"]
    assert rows.desirable.tolist() == [row["label"] for row in labelled(6)]
    prompts = np.array([int(row.loss_mask.argmax()) for row in rows])
    assert rows.max_mismatched_length == prompts.max() + (rows.lengths - prompts).max()


def test_other_labels_are_other_data(tmp_path: Path, prepare: Prepare) -> None:
    """A run must not resume with labels that were changed under it."""
    rows = labelled(6)
    flipped = [{**row, "label": not row["label"]} for row in rows]
    files = [written(tmp_path / f"{name}.jsonl", *each) for name, each in (("rows", rows), ("flipped", flipped))]
    assert prepare(files[0]).fingerprint != prepare(files[1]).fingerprint


def test_rows_come_back_from_cache_and_run_folder(tmp_path: Path, prepare: Prepare) -> None:
    file = write_labelled(tmp_path / "rows.jsonl", count=30)
    first, again = prepare(file, eval=0.3), prepare(file, eval=0.3)
    assert again.report.sources[0].cached
    save_rows(tmp_path / "rows", first, first.fingerprint)
    stored = load_rows(tmp_path / "rows")
    labels = [[row.desirable for row in rows] for rows in (first.eval, again.eval, stored.eval)]
    assert labels[0] == labels[1] == labels[2]
    assert {True, False} == set(labels[0])
    assert all((row.answer is None) is not row.desirable for row in stored.eval)


def test_a_conversation_with_a_label_is_about_its_last_turn(tmp_path: Path, prepare: Prepare) -> None:
    turns = [{"role": role, "content": role * 2} for role in ("user", "assistant", "user", "assistant")]
    whole = written(tmp_path / "whole.jsonl", {"messages": turns, "label": False})
    halves = written(tmp_path / "halves.jsonl", {"prompt": turns[:3], "completion": turns[3:], "label": False})
    [row], [other] = rows_of(prepare(whole)), rows_of(prepare(halves))
    assert np.array_equal(row.input_ids, other.input_ids)
    assert np.array_equal(row.loss_mask, other.loss_mask)
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in turns
    ]
    tagged = written(tmp_path / "tagged.jsonl", {"conversations": sharegpt, "kto_tag": "False"})
    with pytest.raises(DataError, match=r"data.columns: \{messages: conversations, label: kto_tag\}"):
        prepare(tagged)
    [third] = rows_of(prepare(tagged, columns={"messages": "conversations", "label": "kto_tag"}))
    assert np.array_equal(third.input_ids, row.input_ids)
    assert third.desirable is row.desirable is False


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("true", True), ("False", False), ("0", False)],
)
def test_labels_as_users_write_them(value: Any, expected: bool) -> None:
    assert read_label(value) is expected


@pytest.mark.parametrize(
    ("value", "found"), [(None, "null"), ("good", "another string"), (2, "another number"), ([True], "a list")]
)
def test_other_labels_are_refused(value: Any, found: str) -> None:
    with pytest.raises(UnusableRowError, match=f"label is {found}, expected true for a desirable answer or false"):
        read_label(value)


def test_unusable_rows_are_dropped_and_counted(tmp_path: Path, prepare: Prepare) -> None:
    rows = labelled(4)
    rows[1]["label"] = "good"
    rows[2] = {"prompt": "one", "completion": " ", "label": True}
    rows[3]["completion"] = [{"role": "assistant", "content": "no " * 300}]
    data = prepare(written(tmp_path / "rows.jsonl", *rows), max_dropped=1.0, max_length=200)
    assert data.report.sources[0].summary.dropped.counts == {
        "label is another string, expected true for a desirable answer or false (also 1 or 0)": 1,
        "completion is empty": 1, "longer than data.max_length (200 tokens)": 1,
    }  # fmt: skip


def test_a_pair_is_two_rows(tmp_path: Path, prepare: Prepare) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", count=4)
    pairs, data = rows_of(prepare(file, dataset_type="preference")), prepare(file, deduplicate=True)
    rows = rows_of(data)
    assert [row.desirable for row in rows] == [True, False] * 4
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    assert all(np.array_equal(*both) for both in zip(
        (row.input_ids for row in rows), (each.input_ids for each in sequences), strict=True
    ))  # fmt: skip
    assert "4 rows (format preference), 0 dropped, 8 as answers without pairs" in data.report.sources[0].line()


def test_a_share_holds_out_all_answers_to_a_prompt(tmp_path: Path, prepare: Prepare) -> None:
    other = [
        {**row, "completion": [{"role": "assistant", "content": "another"}], "label": False} for row in labelled(20)
    ]
    for file in (
        write_pairs(tmp_path / "pairs.jsonl", count=20), written(tmp_path / "rows.jsonl", *labelled(20), *other),
    ):  # fmt: skip
        data = prepare(file, eval=0.3)
        prompts = [[row.input_ids[: row.prompt_length].tolist() for row in rows] for rows in (data.eval, rows_of(data))]
        assert prompts[0]
        assert not [prompt for prompt in prompts[0] if prompt in prompts[1]]
        assert all((row.answer is None) is not row.desirable for row in data.eval)


def test_other_objectives_name_the_one_for_these_rows(tmp_path: Path, prepare: Prepare) -> None:
    file = write_labelled(tmp_path / "rows.jsonl", count=3)
    with pytest.raises(DataError, match=r"the format unpaired_preference; set train.objective: kto"):
        prepare(file, dataset_type="preference")
    with pytest.raises(DataError, match=r"label is false.*train.objective: kto trains on both kinds"):
        prepare(file, dataset_type="language_modeling")
    plain = written(tmp_path / "sft.jsonl", {"prompt": "one", "completion": "two"})
    with pytest.raises(DataError, match=r"or prompt \+ completion \+ label.*label marks each answer, true or false"):
        prepare(plain)


def test_the_report_shows_labels_and_their_balance(tmp_path: Path, prepare: Prepare) -> None:
    report = prepare(write_labelled(tmp_path / "rows.jsonl", count=12)).report
    assert [row.where.rpartition(" ")[2] for row in report.first_rows[:2]] == ["(desirable)", "(undesirable)"]
    assert "12 rows (8 desirable, " in report.splits["data.train"].lines("data.train", 1024)[0]
    [finding] = report.findings()
    advice = "their losses weigh 8 to 4; for a ratio between 1:1 and 4:3 set train.undesirable_weight: 2"
    assert finding.text.endswith(advice)


def test_recommended_weights_balance_the_labels() -> None:
    for num_desirable, num_rows in ((8, 12), (5, 600), (333, 1000), (6, 13), (99_999, 100_000)):
        text = imbalance(num_desirable, num_rows, 1.0, 1.0)
        assert text is not None
        name, weight = text.rpartition("train.")[2].split(": ")
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, name: float(weight)}
        ratio = (
            weights["desirable_weight"] * num_desirable / (weights["undesirable_weight"] * (num_rows - num_desirable))
        )
        assert 1 <= ratio <= 4 / 3
        assert imbalance(num_desirable, num_rows, **weights) is None
    assert imbalance(4, 7, 1.0, 1.0) is None
    assert str(imbalance(3, 3, 1.0, 1.0)).startswith("all 3 rows are desirable")
