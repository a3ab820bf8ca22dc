"""Layouts of preference pairs in files: several rejected answers, dialogues in one string, scores of both answers."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_train.data.readers import json_type
from qlora_train.data.types import Message, Record, UnusableRowError

SCORES = ("score_chosen", "score_rejected")
"""Optional columns of the formats of pairs, as in UltraFeedback."""
SEVERAL_REJECTED = "several rejected answers, read as a pair each"
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""Start of a turn in the layout of Anthropic's HH-RLHF: a conversation in one string."""


def pair_records(record: Record, rejected: str) -> list[Record]:
    """Return a record for each answer in the list of its column `rejected`; the record itself if that is one answer."""
    answers = record.values.get(rejected)
    if not isinstance(answers, list) or not answers or not (_are_all(answers, str) or _are_all(answers, list)):
        return [record]
    return [replace(record, values={**record.values, rejected: answer}) for answer in answers]


def _are_all(values: Any, kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def is_dialogue(text: str) -> bool:
    """Return whether a string is a conversation in the layout of HH-RLHF."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def dialogue_turns(text: str) -> list[Message]:
    """Return the turns of a string for which `is_dialogue` holds, without the white space around them."""
    parts = HH_TURN.split(text.lstrip())
    names, contents = parts[1::2], parts[2::2]
    return [{"role": HH_ROLES[name], "content": content.strip()} for name, content in zip(names, contents, strict=True)]


def lacks_prompt(answer: Any) -> bool:
    """Return whether an answer needs a column with its prompt: it is a string, or begins with an assistant turn."""
    if isinstance(answer, str):
        return not is_dialogue(answer)
    first = answer[0] if isinstance(answer, list) and answer else answer
    return isinstance(first, dict) and (first.get("role") == "assistant" or first.get("from") in ("gpt", "assistant"))


def refuse_tie(values: Mapping[str, Any]) -> None:
    """Raise UnusableRowError if both answers have the same score, or one that cannot be compared."""
    scores = [values.get(name) for name in SCORES]
    if None in scores:
        return
    for name, score in zip(SCORES, scores, strict=True):
        if type(score) not in (int, float):
            raise UnusableRowError(f"{name} is {json_type(score)}, expected a number")
    if scores[0] == scores[1]:
        raise UnusableRowError("a tie: score_chosen and score_rejected are equal")
