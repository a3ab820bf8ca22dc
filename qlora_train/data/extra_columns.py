"""Columns beside those of a format that change what a row means: the row is refused, or a warning names the column.

Other columns (ids, sources, scores) do not matter for training.
"""

from collections.abc import Collection, Mapping
from typing import Any

from qlora_train.data.field_values import EMPTY
from qlora_train.data.types import UnusableRowError

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
LABELS = ("label", "kto_tag")
"""Columns in which TRL and LLaMA-Factory mark answers as desirable (KTO)."""
CONSEQUENCES = {
    **dict.fromkeys(
        ("chosen", "rejected", "chosen_response", "rejected_response", "chosen_messages", "rejected_messages"),
        "train.objective: sft trains on one answer",
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
    **dict.fromkeys(LABELS, "only false, for an undesirable answer, has a meaning here"),
}
"""Column -> the end of its warning."""
SCORES_OF_PAIRS = {
    f"{answer}{rest}": f"data.columns: {{{{score_{answer}: {answer}{rest}}}}} drops pairs with equal scores"
    for answer in ("chosen", "rejected")
    for rest in ("_score", "_rating", "-score", "-rating")
}
"""The same for columns of preference pairs only."""


def extra_columns(used: Collection[str], *, of_pairs: bool = False) -> tuple[str, ...]:
    """Return the names to look for in rows of which the columns `used` are read."""
    names = (*MEDIA, *CONSEQUENCES, *(SCORES_OF_PAIRS if of_pairs else ()))
    return tuple(name for name in names if name not in used)


def check_extra_columns(values: Mapping[str, Any], names: Collection[str], *, has_answers: bool) -> tuple[str, ...]:
    """Return a warning for each of the columns `names` that a row fills.

    Args:
        names: from `extra_columns`.
        has_answers: the format separates answers from prompts.

    Raises:
        UnusableRowError: a column reverses the meaning of the row, or holds what its answers are about.
    """
    filled = [name for name in names if name in values and values[name] not in EMPTY]
    for name in filled:
        if name in MEDIA:
            raise UnusableRowError(
                f"the column {name} holds what a text model does not see; leave the row out, or the column where no answer "
                "depends on it"
            )
        if name in LABELS and has_answers and (values[name] is False or values[name] in ("false", "False")):
            raise UnusableRowError(
                f"{name} is false, which marks an undesirable answer: train.objective: kto trains on both kinds, sft on "
                "rows whose label is true"
            )
        if name == "chosen" and isinstance(values[name], dict):
            raise UnusableRowError(
                "chosen is the answer of a preference pair; set train.objective: dpo with data.format: preference and "
                "data.columns: {prompt: conversations}"
            )
    return tuple(_warning(name, values[name], has_answers=has_answers) for name in filled)


def _warning(name: str, value: Any, *, has_answers: bool) -> str:
    if not has_answers:
        return f"the column {name} is not used"
    if name in LABELS and value in (True, "true", "True"):
        return f"{name} is true, and the row is trained as any other (train.objective: kto reads it)"
    return f"the column {name} is not used: {(CONSEQUENCES | SCORES_OF_PAIRS)[name].format(name)}"
