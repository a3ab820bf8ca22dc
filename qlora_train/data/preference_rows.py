"""One row of a preference format: a prompt with a chosen and a rejected answer, or two whole conversations.

Only the answers are trained: the turns that both conversations share at the start are their prompt.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_train.data.conversation import read_turns
from qlora_train.data.field_values import EMPTY, read_optional_string, read_string
from qlora_train.data.format_readers import conversation_row, from_prompt_completion, joined
from qlora_train.data.formats import CONVERSATION_COLUMNS
from qlora_train.data.pair_layouts import dialogue_turns, is_dialogue, refuse_tie
from qlora_train.data.readers import json_type
from qlora_train.data.types import Message, Row, UnusableRowError

ANSWERS = ("chosen", "rejected")
OPENAI_NAMES = {"chosen": "preferred_output", "rejected": "non_preferred_output", "prompt": "input.messages"}
"""Our columns and those of OpenAI's preference fine-tuning."""
OPENAI_REQUEST = ("messages", "tools", "parallel_tool_calls")
"""Fields of `input`; the last one is a setting of requests."""


def from_preference(where: str, values: Mapping[str, Any]) -> Row:
    """Read a pair: the chosen row, with the other one as `rejected`."""
    refuse_tie(values)
    values = {**values, **{name: [values[name]] for name in ANSWERS if isinstance(values[name], dict)}}
    answers = [values[column] for column in ANSWERS]
    if all(isinstance(answer, str) for answer in answers):
        if values.get("prompt") in EMPTY and all(map(is_dialogue, answers)):
            values = {**values, **{name: dialogue_turns(values[name]) for name in ANSWERS}}
        elif isinstance(values.get("prompt"), list):
            values = _with_answer_turns(values)
    types = [json_type(values[column]) for column in ANSWERS]
    if types == ["a string", "a string"]:
        chosen, rejected = (_text(where, values, column) for column in ANSWERS)
    elif types == ["a list", "a list"]:
        chosen, rejected = _conversations(where, values)
    else:
        raise UnusableRowError(
            f"chosen is {types[0]} and rejected is {types[1]}, expected two strings or two lists of {{role, content}}"
        )
    return replace(chosen, rejected=rejected)


def from_question_preference(where: str, values: Mapping[str, Any]) -> Row:
    """Read a question with two answers, each a string: turns of a conversation."""
    before, after = (read_optional_string(values.get(name), name) for name in ("context", "input"))
    question = joined(joined(before, read_string(values["question"], "question")), after)
    if not question.strip():
        raise UnusableRowError("question is empty")
    return from_preference(where, _with_answer_turns({**values, "prompt": [{"role": "user", "content": question}]}))


def from_openai_preference(where: str, values: Mapping[str, Any]) -> Row:
    """Read a pair in the shape of OpenAI's preference fine-tuning."""
    request = values["input"]
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise UnusableRowError(f"input is {json_type(request)}, expected an object with messages, a list of turns")
    lost = next((name for name in request if name not in OPENAI_REQUEST and request[name] not in EMPTY), None)
    if lost is not None:
        raise UnusableRowError(f"input has the field {lost}, which training would lose; remove it")
    for column in ("preferred_output", "non_preferred_output"):
        if not isinstance(values[column], list):
            raise UnusableRowError(f"{column} is {json_type(values[column])}, expected a list of {{role, content}}")
    columns = {"prompt": request["messages"], "tools": request.get("tools")}
    try:
        return from_preference(where, columns | {name: values[OPENAI_NAMES[name]] for name in ANSWERS})
    except UnusableRowError as error:  # its reason has our names of columns, and quotes no row
        named = re.sub(r"\b(chosen|rejected|prompt)\b", lambda found: OPENAI_NAMES[found[0]], str(error))
        raise UnusableRowError(named) from None


def _text(where: str, values: Mapping[str, Any], column: str) -> Row:
    if values.get("prompt") in EMPTY:
        raise UnusableRowError(
            "chosen and rejected are strings without a prompt; expected a column prompt beside them, or turns that begin "
            "with Human: and Assistant:"
        )
    if not read_string(values[column], column).strip():
        raise UnusableRowError(f"{column} is empty")
    for name in CONVERSATION_COLUMNS:
        if values.get(name) not in EMPTY:
            raise UnusableRowError(
                f"{name} beside a prompt that is a string, to which no chat template is applied; data.columns: "
                "{question: prompt} makes turns of it"
            )
    return from_prompt_completion(where, {**values, "completion": values[column]})


def _with_answer_turns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values in which answers that are strings are an assistant turn each."""
    turns: dict[str, Any] = dict(values)
    for column in ANSWERS:
        if isinstance(values[column], str):
            if not values[column].strip():
                raise UnusableRowError(f"{column} is empty")
            turns[column] = [{"role": "assistant", "content": values[column]}]
    return turns


def _conversations(where: str, values: Mapping[str, Any]) -> tuple[Row, Row]:
    prompt, answers = _prompt_turns(values.get("prompt")), [_answer_turns(values, column) for column in ANSWERS]
    system = [turn for turn in answers[0][0][:1] if turn["role"] == "system"]
    if prompt and all(_begins_with(turns, [*system, *prompt]) for turns, _ in answers):
        prompt = [*system, *prompt]  # both answers repeat it behind the same system turn
    (chosen, untrained), (rejected, other_untrained) = (_behind(prompt, *answer) for answer in answers)
    num_shared = len(prompt) or _num_shared(chosen, rejected)
    for turns in (chosen, rejected):
        if turns[num_shared:] and turns[num_shared]["role"] != "assistant":
            raise UnusableRowError("chosen and rejected differ before their answers; expected one prompt for both")
    if chosen == rejected or not chosen[num_shared:] or not rejected[num_shared:]:
        raise UnusableRowError("chosen and rejected do not differ in an answer")
    return (
        conversation_row(where, values, chosen, untrained, loss_from=num_shared),
        conversation_row(where, values, rejected, other_untrained, loss_from=num_shared),
    )


def _prompt_turns(prompt: Any) -> list[Message]:
    if prompt in EMPTY:
        return []
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise UnusableRowError(f"prompt is {json_type(prompt)}, expected a string or a list of {{role, content}}")
    return read_turns(prompt, "prompt", sharegpt=True)[0]


def _behind(prompt: list[Message], turns: list[Message], untrained: Sequence[int]) -> tuple[list[Message], list[int]]:
    """Return a whole conversation: answers may repeat their prompt."""
    if not prompt or _begins_with(turns, prompt):
        return turns, list(untrained)
    if turns[0]["role"] == "system":
        raise UnusableRowError(
            "chosen and rejected begin with different system turns, or ones that prompt lacks; expected the same in both"
        )
    return [*prompt, *turns], [len(prompt) + index for index in untrained]


def _answer_turns(values: Mapping[str, Any], column: str) -> tuple[list[Message], list[int]]:
    return read_turns(values[column], column, sharegpt=True)


def _begins_with(turns: list[Message], first: list[Message]) -> bool:
    return turns[: len(first)] == first


def _num_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    differs = (index for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    return next(differs, min(len(chosen), len(rejected)))
