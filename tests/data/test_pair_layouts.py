"""Layouts of preference data sets: each is read as the pair of turns that a person would write for it, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_train.config import DataSection
from qlora_train.data import PreparedData, prepare_data
from qlora_train.data.formats import recognise
from qlora_train.data.row_reader import RowReader
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Record, Row, UnusableRowError
from qlora_train.utils.errors import DataError
from tests.support.pico import build_tokenizer
from tests.support.rows import chat, read

SYSTEM = {"role": "system", "content": "Be brief."}


def sharegpt(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def pair(values: dict[str, Any], columns: dict[str, str] | None = None) -> tuple[Row, Row]:
    row = read(values, columns, dataset_type="preference")
    assert row.rejected is not None
    return row, row.rejected


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: What?\n\nAssistant: How so?\n\nHuman: Why?\n\nAssistant: So.",
            "rejected": "\n\nHuman: What?\n\nAssistant: How so?\n\nHuman: Why?\n\nAssistant: No. ",
        },
        {},
    ),
    "UltraFeedback": (
        {
            "prompt": "What?", "prompt_id": "3f", "messages": chat("What?", "How so?", "Why?", "So."),
            "chosen": chat("What?", "How so?", "Why?", "So."), "rejected": chat("What?", "How so?", "Why?", "No."),
            "score_chosen": 8.5, "score_rejected": 7.0,
        },
        {},
    ),
    "ShareGPT": (
        {
            "conversations": sharegpt("What?", "How so?", "Why?"),
            "chosen": {"from": "gpt", "value": "So."}, "rejected": {"from": "gpt", "value": "No."},
        },
        {"prompt": "conversations"},
    ),
    "turns and two strings": ({"prompt": chat("What?", "How so?", "Why?"), "chosen": "So.", "rejected": "No."}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_known_layout_is_the_pair_of_whole_conversations(name: str) -> None:
    begin = ("What?", "How so?", "Why?")
    expected = pair({"chosen": chat(*begin, "So."), "rejected": chat(*begin, "No.")})
    found = pair(*LAYOUTS[name])
    assert [row.messages for row in found] == [row.messages for row in expected]
    if name != "UltraFeedback":  # its prompt is the first turn alone
        assert [row.loss_from for row in found] == [row.loss_from for row in expected] == [3, 3]
    assert all(not row.warnings for row in found)


def test_a_question_with_system_and_context_is_a_conversation() -> None:
    orca = {"system": "Be brief.", "question": "What?", "chosen": "So.", "rejected": "No."}
    expected = [(SYSTEM, *chat("What?", answer)) for answer in ("So.", "No.")]
    assert [row.messages for row in pair(orca)] == expected
    alpaca = {"instruction": "What", "input": "is it?", "chosen": "So.", "rejected": "No."}
    found = pair(alpaca, {"question": "instruction"})
    assert [row.messages for row in found] == [tuple(chat("What\n\nis it?", answer)) for answer in ("So.", "No.")]
    found = pair({"context": "It is so.", "question": "What?", "chosen": "So.", "rejected": "No."})
    assert [row.messages for row in found] == [tuple(chat("It is so.\n\nWhat?", answer)) for answer in ("So.", "No.")]


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "rename with data.columns: {question: instruction}"),
        ({"input": "a", "chosen": "b", "rejected": "c"}, "rename with data.columns: {question: input}"),
        ({"instruction": "a", "input": "x", "chosen": "b", "rejected": "c"},
         "rename with data.columns: {question: instruction}"),
        ({"conversations": chat("a"), "chosen": chat("a", "b")[1], "rejected": chat("a", "c")[1]},
         "rename with data.columns: {prompt: conversations}"),
        ({"chosen": "b", "rejected": "c"}, "expected a column prompt beside them"),
        ({"text": "a", "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]},
         "expected a column prompt beside them"),
    ],
)  # fmt: skip
def test_pairs_without_prompt_are_refused_at_once_with_the_rename_that_reads_them(
    values: dict[str, Any], advice: str
) -> None:
    with pytest.raises(DataError, match="answers without their prompt") as caught:
        read(values, dataset_type="preference")
    assert str(caught.value).endswith(f"; {advice}")
    if "data.columns" in advice:
        column, _, name = advice.partition("{")[2].removesuffix("}").partition(": ")
        assert pair(values, {column: name})
        with pytest.raises(DataError) as caught:
            read(values, format_name="preference", dataset_type="preference")
        renames = str(caught.value).partition("data.columns: ")[2]
        assert renames == f"{{prompt: {name}}}"
        row = read(values, {"prompt": name}, "preference", "preference")
        assert row.rejected is not None


def test_a_prompt_and_a_question_are_ambiguous() -> None:
    values = {"prompt": "a", "question": "b", "chosen": "c", "rejected": "d"}
    with pytest.raises(DataError, match=r"fit preference and question_preference; set data\.format"):
        read(values, dataset_type="preference")
    assert read(values, format_name="preference", dataset_type="preference").prompt == "a"


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ((7, 7.0), "a tie: score_chosen and score_rejected are equal"),
        (("8", 7.0), "score_chosen is a string, expected a number"),
        ((7.0, True), "score_rejected is true or false, expected a number"),
        ((8.5, 7), None), ((7, 8.5), None), ((None, 7), None), ((None, None), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["prompt", "question"])
def test_pairs_with_equal_scores_are_refused(column: str, scores: tuple[Any, Any], reason: str | None) -> None:
    values = {column: "a", "chosen": "b", "rejected": "c", "score_chosen": scores[0], "score_rejected": scores[1]}
    if reason is None:
        assert pair(values)
        return
    with pytest.raises(UnusableRowError) as caught:
        pair(values)
    assert caught.value.reason == reason


def test_scores_under_other_names_get_a_warning_with_the_rename_that_reads_them() -> None:
    values = {"prompt": "a", "chosen": "b", "rejected": "c", "chosen-rating": 5, "rejected-rating": 5}
    row, _ = pair(values)
    assert row.warnings[0] == (
        "the column chosen-rating is not used: data.columns: {score_chosen: chosen-rating} drops pairs with equal scores"
    )
    with pytest.raises(UnusableRowError, match="a tie"):
        pair(values, {"score_chosen": "chosen-rating", "score_rejected": "rejected-rating"})
    assert read({"messages": chat("a", "b"), "chosen-rating": 5}).warnings == ()


def test_sft_on_the_chosen_answers_warns_that_the_rejected_ones_are_not_used() -> None:
    row = read({"prompt": "a", "chosen": "b", "rejected": "c"}, {"completion": "chosen"})
    assert row.text == "b"
    assert row.warnings == ("the column rejected is not used: train.objective: sft trains on one answer",)


@pytest.mark.parametrize("rejected", [["c", "d"], [chat("a", "c")[1:], chat("a", "d")[1:]]])
def test_several_rejected_answers_are_a_pair_each(rejected: list[Any]) -> None:
    chosen = "b" if isinstance(rejected[0], str) else chat("a", "b")[1:]
    record = Record("a.jsonl:1", {"prompt": "a", "chosen": chosen, "worse": rejected})
    columns = {"rejected": "worse"}
    reader = RowReader(recognise(record, "auto", columns, "preference"), columns)
    rows = [reader.read(part) for part in reader.split(record)]
    expected = [pair({"prompt": "a", "chosen": chosen, "rejected": answer}) for answer in rejected]
    assert [(row, row.rejected) for row in rows] == expected


def prepare(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> PreparedData:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection.model_validate({"train": str(file), "cache_dir": str(tmp_path / "cache"), **settings})
    return prepare_data(section, build_tokenizer(), 0, dataset_type="preference")


def test_several_rejected_answers_are_counted_and_dropped_one_by_one(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a ", "chosen": "b", "rejected": ["c", "d", ""]},
        {"prompt": "e ", "chosen": "f", "rejected": "g"},
    ]
    data = prepare(tmp_path, rows, max_dropped=0.5)
    summary = data.report.sources[0].summary
    assert (summary.num_records, summary.num_rows) == (4, 3)
    assert summary.dropped.counts == {"rejected is empty": 1}
    assert summary.warned.counts["several rejected answers, read as a pair each"] == 1
    assert isinstance(data.train, Rows)
    assert len({tuple(row.rejected.input_ids) for row in data.train if row.rejected}) == 3


def test_masks_of_a_dialogue_are_those_of_its_turns(tmp_path: Path) -> None:
    hh = {"chosen": "\n\nHuman: What?\n\nAssistant: So.", "rejected": "\n\nHuman: What?\n\nAssistant: No."}
    turns = {"chosen": chat("What?", "So."), "rejected": chat("What?", "No.")}
    question = {"question": "What?", "chosen": "So.", "rejected": "No."}
    stored = []
    for number, row in enumerate((hh, turns, question)):
        folder = tmp_path / str(number)
        folder.mkdir()
        [example] = prepare(folder, [row]).train  # type: ignore[misc]
        stored.append([(each.input_ids.tolist(), each.loss_mask.tolist()) for each in example.sequences])
    assert stored[0] == stored[1] == stored[2]
