"""Answers of samples.jsonl: each prompt with what the model answered at each evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_train.report.graded_answers import GradedAnswer, grade


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out prompt with its answers by step."""

    prompt: str
    expected: str
    answers: tuple[tuple[int, GradedAnswer], ...]


def samples_by_prompt(samples: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """Return the prompts in their order, each with its answers, the earliest first."""
    by_row: dict[Any, list[Mapping[str, Any]]] = {}
    for line in sorted(samples, key=lambda line: line["step"]):
        by_row.setdefault(line["row"], []).append(line)
    return [_sample(lines) for lines in by_row.values()]


def _sample(lines: Sequence[Mapping[str, Any]]) -> Sample:
    expected = [str(line["expected"]) for line in lines]
    graded = grade("sample", expected, [str(line["generated"]) for line in lines])
    steps = [int(line["step"]) for line in lines]
    return Sample(str(lines[0]["prompt"]), expected[0], tuple(zip(steps, graded, strict=True)))
