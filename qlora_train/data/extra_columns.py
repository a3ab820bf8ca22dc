"""Columns beside those of a format that change what a row means: the row is refused, or what is not used is noted.

Other columns (ids, sources, scores) say nothing about what to train on.
"""

from collections.abc import Collection, Mapping
from typing import Any

from qlora_train.data.field_values import NOTHING
from qlora_train.data.types import UnusableRowError

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
LABELS = ("label", "kto_tag")
"""Columns in which TRL and LLaMA-Factory say whether an answer is wanted (KTO)."""
MATTERS = {
    **dict.fromkeys(
        ("chosen", "rejected", "chosen_response", "rejected_response", "chosen_messages", "rejected_messages"),
        "preference pairs have no training of their own here",
    ),
    **dict.fromkeys(
        ("system", "system_prompt", "system_message"), "data.columns: {{system: {0}}} makes it the system turn"
    ),
    **dict.fromkeys(("tools", "functions"), "data.columns: {{tools: {0}}} gives it to the chat template"),
    "chat_template_kwargs": "another column has its name",
    **dict.fromkeys(("context", "input", "history", "documents", "passage", "solution"), "answers may depend on it"),
    **dict.fromkeys(
        ("reasoning", "reasoning_content", "thinking", "rationale", "chain_of_thought", "cot"),
        "reasoning is read in a turn, as reasoning_content",
    ),
    **dict.fromkeys(("weight", "weights", "sample_weight"), "rows of a source weigh the same"),
    **dict.fromkeys(LABELS, "only false, for an answer that is not wanted, has a meaning here"),
}
"""Column -> what its note says."""


def other_columns(used: Collection[str]) -> tuple[str, ...]:
    """Return the names to look for in rows of which the columns `used` are read."""
    return tuple(name for name in (*MEDIA, *MATTERS) if name not in used)


def check_other_columns(values: Mapping[str, Any], names: Collection[str], *, has_answers: bool) -> tuple[str, ...]:
    """Return notes on those of the columns `names` that a row fills.

    Args:
        values: the row's columns.
        names: from `other_columns`.
        has_answers: the format tells answers from prompts.

    Raises:
        UnusableRowError: a column turns the meaning of the row round, or holds what its answers are about.
    """
    filled = [name for name in names if name in values and values[name] not in NOTHING]
    for name in filled:
        if name in MEDIA:
            raise UnusableRowError(
                f"the column {name} holds what a text model does not see; leave the row out, or the column where no answer "
                "depends on it"
            )
        if name in LABELS and has_answers and (values[name] is False or values[name] in ("false", "False")):
            raise UnusableRowError(
                f"{name} is false: training would teach an answer that is not wanted; there is no preference training: "
                "keep rows whose label is true only"
            )
        if name == "chosen" and isinstance(values[name], dict):
            raise UnusableRowError(
                "chosen is the answer of a preference pair, which no training here uses; append it to the conversation to "
                "train on it and on nothing else"
            )
    return tuple(_note(name, values[name], has_answers=has_answers) for name in filled)


def _note(name: str, value: Any, *, has_answers: bool) -> str:
    if not has_answers:
        return f"the column {name} is not used"
    if name in LABELS and value in (True, "true", "True"):
        return f"{name} is true, and the row is trained as any other (there is no preference training)"
    return f"the column {name} is not used: {MATTERS[name].format(name)}"
