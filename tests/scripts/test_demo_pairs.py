"""The demo's preference pairs: wrong answers are wrong, plausible and deterministic, and the package reads them."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

import demo_data
import demo_pairs

from qlora_train.data.preference_rows import from_preference
from qlora_train.evaluation.scoring import score_answers

PARTS = {"number": "12", "street": "Main St", "unit": "Apt 3", "city": "West Palm Beach", "state": "FL", "zip": "33405"}
ADDRESSES = [
    demo_data.row(f"{number} {' '.join(PARTS.values())}", {**PARTS, "number": str(number)}) for number in range(40)
] + [demo_data.row("Town Hall", {"place": "Town Hall"}), demo_data.row("FL FL", {"city": "FL", "state": "FL"})]


def conversations() -> list[Any]:
    return [row["messages"] for row in ADDRESSES]


def answers(pairs: list[dict[str, Any]], column: str) -> list[str]:
    return [pair[column][0]["content"] for pair in pairs]


def test_no_wrong_answer_matches_the_right_one() -> None:
    for seed in range(20):
        pairs = list(demo_pairs.changed_pairs(conversations(), seed))
        assert len(pairs) == len(ADDRESSES)
        scores = score_answers(answers(pairs, "chosen"), answers(pairs, "rejected"))
        assert not any(scores.matches)
        assert scores.valid_json == 1


@pytest.mark.parametrize("change", demo_pairs.CHANGES)
def test_changes_keep_words_but_those_of_a_part_left_out(change: demo_pairs.Change) -> None:
    for seed in range(50):
        changed = change(PARTS, random.Random(seed))
        words, before = (sorted(" ".join(parts.values()).split()) for parts in (changed, PARTS))
        assert set(changed) <= set(demo_pairs.NAMES)
        if change is demo_pairs.drop_part:
            assert len(changed) == len(PARTS) - 1
        else:
            assert words == before


def test_pair_of_an_address_depends_on_the_seed_and_not_on_other_addresses() -> None:
    pairs = list(demo_pairs.changed_pairs(conversations(), 1))
    assert list(demo_pairs.changed_pairs(conversations()[5:], 1)) == pairs[5:]
    assert list(demo_pairs.changed_pairs(conversations(), 2)) != pairs


def test_answers_of_a_model_make_pairs_where_they_are_wrong() -> None:
    right = [turns[-1]["content"] for turns in conversations()]
    wrong = right[1].replace("Main St", "Main")
    own = demo_pairs.own_pairs(conversations(), [right[0], wrong, "", *right[3:]])
    assert {address: pair["rejected"][0]["content"] for address, pair in own.items()} == {
        conversations()[1][-2]["content"]: wrong
    }
    assert answers(list(own.values()), "chosen") == [right[1]]


def test_package_reads_every_pair_with_its_prompt(tmp_path: Path) -> None:
    pairs = list(demo_pairs.changed_pairs(conversations(), 0))
    demo_pairs.write(tmp_path / "pairs.jsonl", pairs)
    lines = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [from_preference("pairs.jsonl", json.loads(line)) for line in lines]
    assert len(rows) == len(ADDRESSES)
    assert all(row.rejected is not None for row in rows)
