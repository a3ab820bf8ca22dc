"""Pairs of one prompt stay together; length bias, contradictions and duplicates are findings of the report."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_train.config import DataSection
from qlora_train.data import PreparedData, prepare_data
from qlora_train.data.data_report import DataReport
from qlora_train.data.token_store import Rows
from tests.support.pico import build_tokenizer
from tests.support.rows import chat

Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    tokenizer = build_tokenizer()

    def prepared(rows: list[dict[str, Any]], *, held_out: list[dict[str, Any]] | None = None, **settings: Any) -> Any:
        files = []
        for name, each in (("train", rows), ("eval", held_out)):
            if each is not None:
                files.append(tmp_path / f"{name}.jsonl")
                files[-1].write_text("".join(json.dumps(row) + "\n" for row in each))
        if held_out is not None:
            settings["eval"] = str(files[1])
        section = DataSection.model_validate(
            {"train": str(files[0]), "cache_dir": str(tmp_path / "cache"), "max_length": 256, **settings}
        )
        return prepare_data(section, tokenizer, 0, dataset_type="preference")

    return prepared


def pairs(num_prompts: int, pairs_per_prompt: int) -> list[dict[str, Any]]:
    rows = [
        {"prompt": chat(f"prompt {prompt}"), "chosen": f"right {answer}", "rejected": f"wrong {answer}"}
        for answer in range(pairs_per_prompt)
        for prompt in range(num_prompts)
    ]
    random.Random(0).shuffle(rows)
    return rows


def prompts_of(rows: Any) -> list[str]:
    """Return the first number of each row's text: the tokenizer has one token per character of these."""
    tokenizer = build_tokenizer()
    return [tokenizer.decode(row.input_ids).partition("prompt ")[2].partition("<")[0] for row in rows]


def warnings(report: DataReport, key: str = "data.train") -> list[str]:
    return [finding.text for finding in report.findings() if finding.key == key]


def test_pairs_of_one_prompt_are_all_trained_on_or_all_held_out(prepare: Prepare) -> None:
    data = prepare(pairs(60, 5), eval=0.2)
    assert isinstance(data.train, Rows)
    trained, held_out = prompts_of(data.train), prompts_of(data.eval)
    assert len(trained) + len(held_out) == 300
    assert set(trained) | set(held_out) == {str(number) for number in range(60)}
    assert not set(trained) & set(held_out)
    assert 5 <= len(set(held_out)) <= 20  # 12 are expected
    assert all(row.answer is not None for row in data.eval)


def test_the_prompt_of_whole_conversations_is_what_both_share(prepare: Prepare) -> None:
    rows = [
        {"chosen": chat(f"prompt {number}", f"right {answer}"), "rejected": chat(f"prompt {number}", f"wrong {answer}")}
        for number in range(40)
        for answer in range(2)
    ]
    data = prepare(rows, eval=0.25)
    trained, held_out = prompts_of(data.train), prompts_of(data.eval)
    assert held_out
    assert not set(trained) & set(held_out)


def test_a_pair_moves_with_no_other_row(prepare: Prepare) -> None:
    rows = pairs(60, 3)
    few = set(prompts_of(prepare(rows[:90], eval=0.2).eval))
    many = set(prompts_of(prepare(rows, eval=0.2).eval))
    given = {row["prompt"][0]["content"].removeprefix("prompt ") for row in rows[:90]}
    assert few == many & given


def test_prompts_that_are_also_held_out_are_a_finding_and_deduplicated(prepare: Prepare) -> None:
    train, held_out = pairs(10, 2), [
        {"prompt": chat("prompt 3"), "chosen": "another", "rejected": "answer"},
        {"prompt": chat("prompt 77"), "chosen": "another", "rejected": "answer"},
    ]  # fmt: skip
    data = prepare(train, held_out=held_out)
    [text] = warnings(data.report, "data.eval")
    assert text.startswith("1 of 2 rows are of prompts that are in data.train too, so the evaluation is biased: ")
    without = prepare(train, held_out=held_out, deduplicate=True)
    assert warnings(without.report, "data.eval") == []
    assert sorted(set(prompts_of(data.train)) - set(prompts_of(without.train))) == ["3"]


def test_the_answers_lengths_are_their_labels(prepare: Prepare) -> None:
    data = prepare(pairs(4, 1))
    assert isinstance(data.train, Rows)
    expected = [[int(each.loss_mask.sum()) for each in row.sequences] for row in data.train]
    assert data.train.answer_lengths.tolist() == expected


LONG, SHORT = "one two three four five six seven", "one"


@pytest.mark.parametrize(
    ("num_longer", "num_shorter", "expected"),
    [
        (30, 0, "the chosen answer is longer in 100 % of pairs (median length ratio "),
        (0, 30, "the chosen answer is shorter in 100 % of pairs (median length ratio "),
        (36, 4, "the chosen answer is longer in 90 % of pairs"),
        (10, 0, None),  # too few to say
        (22, 18, None),
    ],
)
def test_answers_that_differ_in_length_are_a_warning(
    prepare: Prepare, num_longer: int, num_shorter: int, expected: str | None
) -> None:
    answers = [(LONG, SHORT)] * num_longer + [(SHORT, LONG)] * num_shorter
    rows = [
        {"prompt": chat(f"prompt {number}"), "chosen": chosen, "rejected": rejected}
        for number, (chosen, rejected) in enumerate(answers)
    ]
    report = prepare(rows).report
    found = [text for text in warnings(report) if "length" in text]
    assert [text[: len(expected)] for text in found] == [expected] if expected else found == []
    if expected:
        assert found[0].endswith("train.objective: sigmoid_norm compares log-probabilities per token")
        assert len(found[0]) < 240
    of_pairs = report.splits["data.train"].pairs
    assert of_pairs is not None
    assert round(of_pairs.share_longer * len(rows)) == num_longer


def test_a_small_difference_in_length_is_no_warning(prepare: Prepare) -> None:
    text = "one two three four five six seven eight nine ten " * 2
    rows = [{"prompt": chat(f"prompt {i}"), "chosen": text + "xy", "rejected": text + "x"} for i in range(40)]
    report = prepare(rows).report
    assert report.splits["data.train"].pairs is not None
    assert report.splits["data.train"].pairs.share_longer == 1
    assert not any("length" in text for text in warnings(report))


def test_contradictory_and_duplicate_pairs_are_counted(prepare: Prepare) -> None:
    rows = pairs(6, 1)
    swapped = {**rows[2], "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    other_prompt = {**swapped, "prompt": chat("prompt 99")}
    report = prepare([*rows, swapped, other_prompt, rows[4]]).report
    contradiction, duplicate = warnings(report)
    assert contradiction.startswith("2 pairs are contradicted by one with the same answers in reverse: ")
    assert "train.jsonl:3, " in contradiction
    assert "train.jsonl:7; remove one of each two" in contradiction
    assert duplicate == "1 pairs equal an earlier one; data.deduplicate: true trains once on each"
    assert report.to_json()["splits"]["data.train"]["pairs"]["num_contradictory"] == 2
    assert any(line.startswith("data.train: pairs of 7 prompts; labels per answer: ") for line in report.lines())


def test_a_pair_that_is_trained_twice_is_no_duplicate(prepare: Prepare, tmp_path: Path) -> None:
    report = prepare(pairs(6, 1), max_rows=None).report
    assert warnings(report) == []
    source = {"path": str(tmp_path / "train.jsonl"), "weight": 2.0}
    section = DataSection.model_validate({"train": [source], "cache_dir": str(tmp_path / "cache")})
    twice = prepare_data(section, build_tokenizer(), 0, dataset_type="preference").report
    assert twice.splits["data.train"].num_rows == 12
    assert warnings(twice) == []
