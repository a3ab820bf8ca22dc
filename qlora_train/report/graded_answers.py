"""Answers before and after training: right or wrong as `eval` scores them, with what differs from the expected one."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from qlora_train.data.types import Prompt
from qlora_train.evaluation.scoring import score_answers

Outcome = Literal["wrong", "broken", "fixed", "right"]
OUTCOMES: dict[Outcome, str] = {
    "wrong": "still wrong",
    "broken": "right before, wrong now",
    "fixed": "wrong before, right now",
    "right": "right before and now",
}
"""What became of a row, the most urgent first, as the page names it."""
MODELS = ("base", "adapter", "merged")
NO_MODELS = {"where", "expected"}
MAX_COMPARED = 2000
"""Characters up to which the differences of two texts are marked."""
_WORD = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """An answer, and whether it is right."""

    name: str
    text: str
    expected: str
    is_right: bool

    @property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        """Pieces of the text, each with whether it differs from the expected answer; a right one differs nowhere."""
        return ((self.text, False),) if self.is_right else marked_differences(self.expected, self.text)


@dataclass(frozen=True, slots=True)
class GradedRow:
    """A held-out row with the answers of each model."""

    where: str
    prompt: str
    expected: str
    answers: tuple[GradedAnswer, ...]
    outcome: Outcome


def grade_answers(answers: Sequence[Mapping[str, Any]], prompts: Mapping[str, Prompt]) -> list[GradedRow]:
    """Return the rows of answers.jsonl, those that are wrong first."""
    if not answers:
        return []
    expected = [str(line["expected"]) for line in answers]
    graded: list[list[GradedAnswer]] = [[] for _ in answers]
    for model in models_of(answers):
        for row, answer in zip(graded, grade(model, expected, [str(line[model]) for line in answers]), strict=True):
            row.append(answer)
    rows = [
        GradedRow(str(line["where"]), prompt_text(prompts.get(line["where"])), text, tuple(row), _outcome(row))
        for line, text, row in zip(answers, expected, graded, strict=True)
    ]
    return sorted(rows, key=lambda row: list(OUTCOMES).index(row.outcome))


def models_of(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the models that answered every row, in the order of training."""
    named = [key for key, value in answers[0].items() if isinstance(value, str) and key not in NO_MODELS]
    complete = [key for key in named if all(isinstance(line.get(key), str) for line in answers)]
    return sorted(complete, key=lambda name: MODELS.index(name) if name in MODELS else len(MODELS))


def grade(name: str, expected: Sequence[str], generated: Sequence[str]) -> list[GradedAnswer]:
    """Return the answers with what is right."""
    matches = score_answers(expected, generated).matches
    return [
        GradedAnswer(name, text, wanted, is_right)
        for wanted, text, is_right in zip(expected, generated, matches, strict=True)
    ]


def count_outcomes(rows: Sequence[GradedRow]) -> dict[Outcome, int]:
    """Return the number of rows by outcome, without those that no row has."""
    counts = Counter(row.outcome for row in rows)
    return {outcome: counts[outcome] for outcome in OUTCOMES if counts[outcome]}


def marked_differences(expected: str, text: str) -> tuple[tuple[str, bool], ...]:
    """Return pieces of `text` that join to it, each with whether `expected` has no such piece there."""
    if max(len(expected), len(text)) > MAX_COMPARED:
        return ((text, False),)
    ours, theirs = _WORD.findall(text), _WORD.findall(expected)
    parts: list[tuple[str, bool]] = []
    end = 0
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        if block.a > end:
            parts.append(("".join(ours[end : block.a]), True))
        if block.size:
            parts.append(("".join(ours[block.a : block.a + block.size]), False))
        end = block.a + block.size
    return tuple(parts) or (("", False),)


def prompt_text(prompt: Prompt | None) -> str:
    """Return the user's words, or every turn with its role if there are several."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    turns = [message for message in prompt if message["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _outcome(answers: Sequence[GradedAnswer]) -> Outcome:
    """Compare the base with the adapter, or with the merged model, or another one, where no adapter answered."""
    by_name = {answer.name: answer.is_right for answer in answers}
    now = next((right for name, right in by_name.items() if name != "base"), by_name.get("base", False))
    before = by_name.get("base", now)
    if now:
        return "right" if before else "fixed"
    return "broken" if before else "wrong"
