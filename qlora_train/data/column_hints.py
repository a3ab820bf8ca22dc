"""Advice for columns that fit no format: renames that complete a format and keep the meaning of the columns."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qlora_train.data.readers.chunk import header_text

QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "input", "request", "user", "human")
ANSWERS = ("output", "answer", "response", "completion", "solution", "reply", "assistant", "target")
CONTEXTS = ("context", "input", "passage")
PROMPTS = ("conversations", *(name for name in QUESTIONS if name != "prompt"))
SYSTEMS = ("system_prompt", "system_message")
PAIR_SUFFIXES = ("", "_response", "_messages")
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("messages", "conversations", "input_ids"), (list,)),
    **dict.fromkeys(("prompt", "completion"), (str, list)),
}
"""Types of columns that do not hold strings only."""
MIN_SIMILARITY = 0.8


def rename_hint(values: Mapping[str, Any], required: Sequence[Sequence[str]]) -> str:
    """Return advice for the columns `values` of a record, to append to a message.

    Args:
        required: the required columns of each format.
    """
    columns = question_and_answer(values)
    if columns:
        return f"; data.columns: {as_yaml(columns)} reads them as a user and an assistant turn"
    likely = next((columns for missing in required if (columns := misspelled(values, missing))), None)
    if likely:
        return f"; rename with data.columns: {as_yaml(likely)}"
    return "; rename with data.columns, e.g. {prompt: request, completion: reply}"


def preference_columns(values: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the renames that read a record as a preference pair; None if it is none."""
    for suffix in PAIR_SUFFIXES:
        names = {column: column + suffix for column in ("chosen", "rejected")}
        if all(name in values for name in names.values()):
            columns = {**prompt_columns(values), **names}
            return {column: name for column, name in columns.items() if column != name}
    return None


def prompt_columns(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the rename that reads the prompt of a preference pair; none where a format reads one, or several may be it.

    A string is the question of a conversation; `input` is read behind another one.
    """
    found = [name for name in PROMPTS if name in values]
    if len(found) == 2 and "input" in found:
        found.remove("input")
    if "prompt" in values or len(found) != 1:
        return {}
    return {"question" if isinstance(values[found[0]], str) else "prompt": found[0]}


def unpaired_columns(values: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the renames that read a record as an answer with LLaMA-Factory's `kto_tag`; None if it has none."""
    if "kto_tag" not in values:
        return None
    turns = {"messages": "conversations"} if "conversations" in values and "messages" not in values else {}
    return {**turns, "label": "kto_tag"}


def misspelled(values: Mapping[str, Any], required: Collection[str]) -> dict[str, str]:
    """Return the renames that give a record all `required` columns; none where a name has no similar one."""
    columns: dict[str, str] = {}
    for column in required:
        if column in values:
            continue
        others = {name.lower(): name for name in values if name not in required and name not in columns.values()}
        nearest = difflib.get_close_matches(column, others, n=1, cutoff=MIN_SIMILARITY)
        if not nearest or not isinstance(values[others[nearest[0]]], TYPES.get(column, (str,))):
            return {}
        columns[column] = others[nearest[0]]
    return columns


def question_and_answer(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the renames that read a record as a question and an answer; none where its names are ambiguous."""
    texts = [name for name, value in values.items() if isinstance(value, str)]
    found = [name for name in ANSWERS if name in texts]
    questions = [name for name in QUESTIONS if name in texts]
    if len(questions) == 2 and "input" in questions:
        questions.remove("input")  # the context of the other
    if len(questions) != 1 or len(found) != 1:
        return {}
    is_alpaca = questions == ["instruction"] or "history" in values
    names = ("instruction", "output", "input") if is_alpaca else ("question", "answer", "context")
    context = next((name for name in CONTEXTS if name in texts and name not in questions), names[2])
    system = next((name for name in SYSTEMS if name in texts), "system")
    columns = dict(zip((*names, "system"), (*questions, *found, context, system), strict=True))
    return {column: name for column, name in columns.items() if column != name}


def as_yaml(columns: Mapping[str, str]) -> str:
    """Return renames as the setting `data.columns`."""
    return "{" + ", ".join(f"{column}: {header_text([name])}" for column, name in columns.items()) + "}"
