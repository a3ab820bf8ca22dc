"""Errors about keys: misspelt ones, keys of other trainers, and keys in the wrong place name the right one."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_train.config import RunConfig, Source, load_config
from qlora_train.config.other_trainers.all_trainers import OTHER_TRAINERS
from qlora_train.utils.errors import ConfigError, num_edits

FILES = Path(__file__).parents[1] / "files" / "other_trainers"
SECTIONS = {name: list(field.annotation.model_fields) for name, field in RunConfig.model_fields.items()}
KEYS_PER_FILE = 80
"""A file with more errors than 100 lists only the first of them."""


def problems(config: dict, folder: Path, overrides: list[str] | None = None) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        load_config(path, overrides or [])
    except ConfigError as error:
        return [problem.removeprefix(f"{path}:1: ") for problem in error.problems]
    return []


def smallest() -> dict:
    return {"model": {"model_name_or_path": "some/model"}, "data": {"train": [{"path": "rows.jsonl"}]}}


def with_one_change(word: str) -> Iterator[str]:
    """A letter replaced, left out, swapped with its neighbour, or added, at each position."""
    for index, letter in enumerate(word):
        yield word[:index] + ("q" if letter != "q" else "x") + word[index + 1 :]
        yield word[:index] + word[index + 1 :]
        yield word[:index] + word[index + 1 : index + 2] + letter + word[index + 2 :]
    for index in range(len(word) + 1):
        yield word[:index] + "q" + word[index:]


def suggestions(folder: Path, place: str, keys: list[str]) -> Iterator[tuple[str, str]]:
    """Return each key, put into a section or a source, with the answer of its error."""
    for start in range(0, len(keys), KEYS_PER_FILE):
        config = smallest()
        config.setdefault(place, {})
        holder = config["data"]["train"][0] if place == "source" else config if place == "" else config[place]
        config.pop("source", None), config.pop("", None)
        part = keys[start : start + KEYS_PER_FILE]
        holder.update({key: {} if place == "" else 1 for key in part})
        found = [
            re.match(r"(?:\S*[.])?(\S+): unknown (?:key|section); (.*)", text) for text in problems(config, folder)
        ]
        answers = {match[1]: match[2] for match in found if match}
        yield from ((key, answers.get(key, "")) for key in part)


def test_every_key_with_one_letter_changed_is_suggested(tmp_path: Path, record_property) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    places = {**SECTIONS, "source": list(Source.model_fields), "": list(SECTIONS)}
    for place, valid in places.items():
        for key in valid:
            typos = sorted(set(with_one_change(key)) - {*valid, ""})
            for typo, answer in suggestions(tmp_path, place, typos):
                named = re.fullmatch(r"did you mean (.*)\?", answer)
                counts["asked"] += 1
                if named and key in named[1].split(" or "):
                    counts["right"] += 1
                else:
                    wrong.append((place, key, typo, answer))
    record_property("share", counts["right"] / counts["asked"])
    assert counts["asked"] > 4000
    assert counts["right"] / counts["asked"] >= 0.98, wrong
    assert len(wrong) < 10, wrong  # today: `r` as another letter, and `column`, which is torchtune's


def test_two_keys_that_are_equally_near_are_both_named(tmp_path: Path) -> None:
    for typo in ("adam_beta", "adam_beta3", "adam_betas"):
        assert problems(smallest() | {"train": {typo: 0.9}}, tmp_path) == [
            f"train.{typo}: unknown key; did you mean adam_beta1 or adam_beta2?"
        ]


@pytest.mark.parametrize(
    ("word", "name", "edits"),
    [
        ("", "abc", 3), ("abc", "abc", 0), ("abc", "acb", 1), ("abc", "bca", 2), ("ca", "abc", 3), ("kitten", "sitting", 3),
        ("learing", "learning", 1), ("laerning", "learning", 1),
    ],
)  # fmt: skip
def test_edits_are_the_optimal_string_alignment_distance(word: str, name: str, edits: int) -> None:
    assert num_edits(word, name) == num_edits(name, word) == edits


def names_of(trainer: str) -> dict[str, str]:
    lines = (FILES / f"{trainer}.keys").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if not line.startswith("#"))
    return {key: expected.strip() for key, expected in pairs}


def answers_to(key: str, folder: Path) -> Iterator[str]:
    """Return the errors of a key: at the top level, in a section, and as overrides; a nested key below its parents."""
    first, _, below = key.partition(".")
    if not below and first not in SECTIONS:
        yield problems(smallest() | {first: "some/name"}, folder)[0]
        yield problems(smallest() | {"export": {first: "some/name"}}, folder)[0]
        yield problems(smallest(), folder, [f"export.{first}=3"])[0]
    elif not below:
        yield problems(smallest() | {"export": {first: "some/name"}}, folder)[0]
    elif first not in SECTIONS:
        name = first.removesuffix("[0]")
        yield problems(smallest() | {name: {below: 1} if name == first else [{below: 1}]}, folder)[0]
        yield problems(smallest(), folder, [f"{name}.{below}=3"] if name == first else [f"{key}=3"])[0]
    else:
        yield problems(smallest() | {first: smallest().get(first, {}) | {below: 1}}, folder)[0]


def is_right(answer: str, expected: str) -> bool:
    """A setting follows `here it is`, also as one of several; a reason holds the word after `no`."""
    if expected.startswith("no "):
        return expected.removeprefix("no ") in answer and bool(re.search("not (supported|needed): ", answer))
    return re.search(rf"here it is (.* for \S.*, )?{re.escape(expected)}(?![\w.])", answer) is not None


@pytest.mark.parametrize("trainer", OTHER_TRAINERS)
def test_keys_of_other_trainers_are_answered(trainer: str, tmp_path: Path, record_property) -> None:
    names = names_of(trainer)
    assert len(names) >= 40
    wrong = [
        (key, expected, answer)
        for key, expected in names.items()
        for answer in answers_to(key, tmp_path)
        if not is_right(answer, expected)
    ]
    share = 1 - len({key for key, _, _ in wrong}) / len(names)
    record_property("share", share)
    assert share >= 0.95, wrong
