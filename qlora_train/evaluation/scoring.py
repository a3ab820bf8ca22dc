"""Compare generated answers with the expected ones, and build few-shot prompts. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_train.data.reasoning import THINK_BLOCK, THINK_END
from qlora_train.data.types import Example, Prompt
from qlora_train.utils.errors import DataError


@dataclass(frozen=True)
class AnswerScores:
    """Shares of all rows; the JSON scores are None unless every expected answer is a JSON object.

    Attributes:
        exact_match: share of answers that equal the expected one (see `score_answers`).
        valid_json: share of answers that are a JSON object.
        field_f1: micro F1 over (key, value) pairs at the top level; an answer that is no object has no pairs.
        matches: exact match by row.
    """

    exact_match: float
    valid_json: float | None
    field_f1: float | None
    matches: tuple[bool, ...]


def score_answers(expected: Sequence[str], got: Sequence[str]) -> AnswerScores:
    """Compare answers with the expected ones.

    Answers are equal when their texts are, apart from white space around them, or when both are JSON objects with the
    same content whatever their spacing and order of keys. JSON types count: 1, 1.0, true and "1" are four values.
    Thoughts before an answer (``<think>...</think>``, also where the prompt opens them) are not compared.

    Raises:
        DataError: there is no answer to score.
        ValueError: the two have different lengths.
    """
    if len(expected) != len(got):
        raise ValueError(f"{len(expected)} expected answers and {len(got)} answers")
    if not expected:
        raise DataError("no answers to score; give data.eval rows with an assistant turn")
    expected = [THINK_BLOCK.sub(r"\2", text) for text in expected]
    got = [_behind_thoughts(answer, text) for text, answer in zip(expected, got, strict=True)]
    wanted, found = [_pairs(text) for text in expected], [_pairs(text) for text in got]
    matches = tuple(
        e.strip() == g.strip() or (w is not None and w == f)
        for e, g, w, f in zip(expected, got, wanted, found, strict=True)
    )
    exact_match = sum(matches) / len(matches)
    if any(pairs is None for pairs in wanted):
        return AnswerScores(exact_match, None, None, matches)
    valid_json = sum(pairs is not None for pairs in found) / len(found)
    return AnswerScores(exact_match, valid_json, _micro_f1(wanted, found), matches)


def _behind_thoughts(answer: str, expected: str) -> str:
    """Return a generated answer without its thoughts, whose opening tag may stand in the prompt."""
    if THINK_END in expected:  # there it is text
        return THINK_BLOCK.sub(r"\2", answer)
    return answer.partition(THINK_END)[2] or answer


Pairs = frozenset[tuple[str, str]]


def _micro_f1(wanted: Sequence[Pairs | None], found: Sequence[Pairs | None]) -> float:
    pairs = [(w or frozenset(), f or frozenset()) for w, f in zip(wanted, found, strict=True)]
    total = sum(len(w) + len(f) for w, f in pairs)
    return 2 * sum(len(w & f) for w, f in pairs) / total if total else 1.0


def _pairs(text: str) -> Pairs | None:
    """Return a JSON object's (key, canonical value) pairs, or None when the text is no JSON object."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return frozenset((key, json.dumps(item, sort_keys=True)) for key, item in value.items())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class RowComparison:
    """Rows by who has them exactly right."""

    both: int
    only_first: int
    only_second: int
    neither: int


def compare_row_by_row(a: AnswerScores, b: AnswerScores) -> RowComparison:
    """Count rows by whether exact match holds for the first, the second, both or neither.

    Raises:
        ValueError: the two are of different numbers of rows.
    """
    if len(a.matches) != len(b.matches):
        raise ValueError(f"{len(a.matches)} rows against {len(b.matches)}")
    outcomes = list(zip(a.matches, b.matches, strict=True))
    return RowComparison(
        both=outcomes.count((True, True)),
        only_first=outcomes.count((True, False)),
        only_second=outcomes.count((False, True)),
        neither=outcomes.count((False, False)),
    )


def few_shot_prompt(prompt: Prompt, shots: Sequence[Example]) -> Prompt:
    """Return the prompt with solved examples before it: earlier turns of a conversation, paragraphs of a plain text.

    A conversation's own system message stays first and is the only one; those of the shots are left out.

    Raises:
        DataError: a shot is no solved example of the prompt's kind.
    """
    for shot in shots:
        if shot.prompt is None or shot.answer is None or isinstance(shot.prompt, str) != isinstance(prompt, str):
            raise DataError(f"{shot.where}: no solved example of this kind; use rows with prompt and answer")
    if isinstance(prompt, str):
        return "\n\n".join([*(f"{shot.prompt}{shot.answer}" for shot in shots), prompt])
    turns = [message for message in prompt if message["role"] == "system"][:1]
    for shot in shots:
        assert not isinstance(shot.prompt, str | None)
        turns += [message for message in shot.prompt if message["role"] != "system"]
        turns.append({"role": "assistant", "content": shot.answer or ""})
    return tuple(turns + [message for message in prompt if message["role"] != "system"])
