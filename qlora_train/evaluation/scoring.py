"""Score generated answers, and build few-shot prompts. No torch."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_train.data.reasoning import THINK_BLOCK, THINK_END
from qlora_train.data.types import Example, Prompt
from qlora_train.utils.errors import DataError

Pairs = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class AnswerScores:
    """Scores over all rows; the JSON scores are None unless every expected answer is a JSON object.

    Attributes:
        exact_match: share of exact answers (see `score_answers`).
        valid_json: share of answers that are a JSON object.
        field_f1: micro F1 over top-level (key, value) pairs; an answer that is not an object has none.
        matches: exact match per row.
    """

    exact_match: float
    valid_json: float | None
    field_f1: float | None
    matches: tuple[bool, ...]


def score_answers(expected: Sequence[str], generated: Sequence[str]) -> AnswerScores:
    """Compare answers with the expected ones.

    Answers match if their stripped texts are equal, or if both are JSON objects of equal content; spacing and key order
    do not count, types do (1, 1.0, true and "1" differ). Thoughts before an answer (``<think>...</think>``, also if the
    prompt opens them) are not compared.

    Raises:
        DataError: no answers.
    """
    if not expected:
        raise DataError("no answers to score; give data.eval rows with an assistant turn")
    generated = [_without_thoughts(answer, text) for text, answer in zip(expected, generated, strict=True)]
    expected = [THINK_BLOCK.sub(r"\2", text) for text in expected]
    expected_pairs = [_pairs(text) for text in expected]
    generated_pairs = [_pairs(text) for text in generated]
    matches = tuple(
        e.strip() == g.strip() or (e_pairs is not None and e_pairs == g_pairs)
        for e, g, e_pairs, g_pairs in zip(expected, generated, expected_pairs, generated_pairs, strict=True)
    )
    exact_match = sum(matches) / len(matches)
    if any(pairs is None for pairs in expected_pairs):
        return AnswerScores(exact_match, None, None, matches)
    valid_json = sum(pairs is not None for pairs in generated_pairs) / len(generated_pairs)
    return AnswerScores(exact_match, valid_json, _micro_f1(expected_pairs, generated_pairs), matches)


def compare_answers(adapter: AnswerScores, merged: AnswerScores) -> dict[str, int]:
    """Count rows by which of the two models answers them exactly."""
    counts = Counter(zip(adapter.matches, merged.matches, strict=True))
    return {
        "both": counts[True, True],
        "only the adapter": counts[True, False],
        "only the merged model": counts[False, True],
        "neither": counts[False, False],
    }


def few_shot_prompt(prompt: Prompt, shots: Sequence[Example]) -> Prompt:
    """Return the prompt with solved examples before it: earlier turns of a conversation, paragraphs of plain text.

    A conversation keeps its own system message first; those of the shots are left out.

    Raises:
        DataError: a shot without prompt and answer, or of another kind than the prompt.
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


def _without_thoughts(answer: str, expected: str) -> str:
    # the opening tag may be in the prompt; an expected answer without thoughts may hold the tag as text
    if THINK_END in THINK_BLOCK.sub(r"\2", expected):
        return THINK_BLOCK.sub(r"\2", answer)
    return answer.partition(THINK_END)[2] or answer


def _micro_f1(expected: Sequence[Pairs | None], generated: Sequence[Pairs | None]) -> float:
    pairs = [(e or frozenset(), g or frozenset()) for e, g in zip(expected, generated, strict=True)]
    total = sum(len(e) + len(g) for e, g in pairs)
    return 2 * sum(len(e & g) for e, g in pairs) / total if total else 1.0


def _pairs(text: str) -> Pairs | None:
    """Return a JSON object's (key, canonical value) pairs; None for any other text."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return frozenset((key, json.dumps(item, sort_keys=True)) for key, item in value.items())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
