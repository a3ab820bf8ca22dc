"""Advice for columns that fit no format: a rename is named only if it completes a format with what it means."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qlora_train.data.readers.csv_table import listed

QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "input", "request", "user", "human")
ANSWERS = ("output", "answer", "response", "completion", "solution", "reply", "assistant", "target")
"""Names under which data sets keep the user's text and the assistant's (Dolly: instruction and response)."""
CONTEXTS = ("context", "input", "passage")
SYSTEMS = ("system_prompt", "system_message")
PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_messages", "rejected_messages"))
"""Columns of preference rows."""
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("messages", "conversations", "input_ids"), (list,)),
    **dict.fromkeys(("prompt", "completion"), (str, list)),
}
"""What columns hold; all others hold strings."""
MIN_LIKENESS = 0.8


def rename_hint(values: Mapping[str, Any], required: Sequence[Sequence[str]]) -> str:
    """Return what to do with the columns of a record that fit no format, to stand behind a message.

    Args:
        values: the record's columns.
        required: of each format, the columns that must be there.
    """
    pair = next((pair for pair in PAIRS if all(column in values for column in pair)), None)
    if pair:
        return (
            "; these are preference pairs, which no training here uses; to train on the chosen answers and nothing else, "
            f"set data.columns: {_shown(_sft_columns(values, pair[0]))}"
        )
    columns = _question_and_answer(values)
    if columns:
        return f"; data.columns: {_shown(columns)} reads them as a user and an assistant turn"
    likely = [columns for missing in required if (columns := misspelled(values, missing))]
    if likely:
        return f"; rename with data.columns: {_shown(likely[0])}"
    return "; rename with data.columns, e.g. {prompt: request, completion: reply}"


def misspelled(values: Mapping[str, Any], required: Collection[str]) -> dict[str, str]:
    """Return the renames that give a record all `required` columns; none where a name has nothing much like it."""
    columns: dict[str, str] = {}
    for column in required:
        if column in values:
            continue
        others = {name.lower(): name for name in values if name not in required and name not in columns.values()}
        nearest = difflib.get_close_matches(column, others, n=1, cutoff=MIN_LIKENESS)
        if not nearest or not isinstance(values[others[nearest[0]]], KINDS.get(column, (str,))):
            return {}
        columns[column] = others[nearest[0]]
    return columns


def _question_and_answer(values: Mapping[str, Any], answers: Sequence[str] = ANSWERS) -> dict[str, str]:
    """Return the renames that read a record as a question and an answer; none where its names leave a choice."""
    texts = [name for name, value in values.items() if isinstance(value, str)]
    found = [name for name in answers if name in texts]
    questions = [name for name in QUESTIONS if name in texts]
    if len(questions) == 2 and "input" in questions:
        questions.remove("input")  # which is about the other
    if len(questions) != 1 or len(found) != 1:
        return {}
    is_alpaca = questions == ["instruction"] or "history" in values
    names = ("instruction", "output", "input") if is_alpaca else ("question", "answer", "context")
    context = next((name for name in CONTEXTS if name in texts and name not in questions), names[2])
    system = next((name for name in SYSTEMS if name in texts), "system")
    columns = dict(zip((*names, "system"), (*questions, *found, context, system), strict=True))
    return {column: name for column, name in columns.items() if column != name}


def _sft_columns(values: Mapping[str, Any], chosen: str) -> dict[str, str]:
    """Return the renames that read the chosen half of preference pairs."""
    answer, prompt = values[chosen], values.get("prompt")
    if isinstance(answer, list):
        if isinstance(prompt, list) and prompt and answer[: len(prompt)] != prompt:
            return {"completion": chosen}
        is_sharegpt = bool(answer) and isinstance(answer[0], dict) and "from" in answer[0]
        return {"conversations" if is_sharegpt else "messages": chosen}
    question = next((name for name in QUESTIONS if name in values), None)
    if question is None:
        return {"text": chosen}
    return _question_and_answer(values, [chosen]) or {"question": question, "answer": chosen}


def _shown(columns: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{column}: {listed([name])}" for column, name in columns.items()) + "}"
