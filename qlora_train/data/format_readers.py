"""One row of each format, from its values by the format's column names (`pretokenized` and `preference_rows` read the
others).

Each reader takes the row's location and values, and raises `UnusableRowError` for a value that cannot be used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_train.data.conversation import check_turns, read_turns
from qlora_train.data.field_values import EMPTY, read_optional_string, read_string
from qlora_train.data.formats import CONVERSATION_COLUMNS
from qlora_train.data.readers import json_type
from qlora_train.data.tool_calls import read_chat_template_kwargs, read_tools
from qlora_train.data.types import Message, Row, UnusableRowError


def from_messages(where: str, values: Mapping[str, Any]) -> Row:
    """Read turns of OpenAI's shape."""
    return conversation_row(where, values, *read_turns(values["messages"], "messages"))


def from_conversations(where: str, values: Mapping[str, Any]) -> Row:
    """Read turns of ShareGPT's shape or of OpenAI's."""
    return conversation_row(where, values, *read_turns(values["conversations"], "conversations", sharegpt=True))


def from_prompt_completion(where: str, values: Mapping[str, Any]) -> Row:
    """Read two strings, or two halves of one conversation."""
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns, untrained = read_turns(prompt, "prompt")
        answers, more_untrained = read_turns(completion, "completion")
        untrained += [len(turns) + index for index in more_untrained]
        return conversation_row(where, values, turns + answers, untrained, loss_from=len(turns))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise UnusableRowError(
            f"prompt is {json_type(prompt)} and completion is {json_type(completion)}, expected two strings or two "
            "lists of {role, content}"
        )
    text = read_string(completion, "completion")
    if not text.strip():
        raise UnusableRowError("completion is empty")
    for column in CONVERSATION_COLUMNS:
        if values.get(column) not in EMPTY:
            raise UnusableRowError(
                f"{column} beside a prompt that is a string, to which no chat template is applied; data.columns: "
                "{question: prompt, answer: completion} makes turns of it"
            )
    return Row(where, text=text, prompt=read_string(prompt, "prompt"))


def from_alpaca(where: str, values: Mapping[str, Any]) -> Row:
    """Read a question and its answer, perhaps with earlier ones."""
    instruction = read_string(values["instruction"], "instruction")
    question = joined(instruction, read_optional_string(values.get("input"), "input"))
    turns = _history(values.get("history")) + _pair(question, read_string(values["output"], "output"))
    return conversation_row(where, values, turns)


def from_question_answer(where: str, values: Mapping[str, Any]) -> Row:
    """Read a question and its answer, perhaps with the text that the question is about."""
    context = read_optional_string(values.get("context"), "context")
    question = joined(context, read_string(values["question"], "question"))
    return conversation_row(where, values, _pair(question, read_string(values["answer"], "answer")))


def from_text(where: str, values: Mapping[str, Any]) -> Row:
    text = read_string(values["text"], "text")
    if not text.strip():
        raise UnusableRowError("text is empty")
    return Row(where, text=text)


def conversation_row(
    where: str, values: Mapping[str, Any], turns: list[Message], untrained: Sequence[int] = (), *, loss_from: int = 0
) -> Row:
    """Return checked turns as a row, with the columns of `CONVERSATION_COLUMNS`."""
    tools = read_tools(values["tools"]) if "tools" in values else ()
    system = read_optional_string(values["system"], "system") if "system" in values else None
    if system is not None and turns[0] != {"role": "system", "content": system}:
        if turns[0]["role"] == "system":
            raise UnusableRowError("the column system and the first turn are two different system prompts")
        turns.insert(0, {"role": "system", "content": system})
        untrained = [index + 1 for index in untrained]
        loss_from += loss_from > 0
    check_turns(turns)
    return Row(
        where,
        messages=tuple(turns),
        loss_from=loss_from,
        untrained=frozenset(untrained),
        tools=tools,
        chat_template_kwargs=read_chat_template_kwargs(values.get("chat_template_kwargs")),
    )


def joined(first: str | None, second: str | None) -> str:
    """Join two texts by a blank line; a blank one leaves the other unchanged."""
    texts = [text for text in (first, second) if text is not None and text.strip()]
    return "\n\n".join(texts) or first or second or ""


def _history(value: Any) -> list[Message]:
    if value in EMPTY:
        return []
    if not isinstance(value, list):
        raise UnusableRowError(f"history is {json_type(value)}, expected a list of [question, answer]")
    turns: list[Message] = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnusableRowError("history holds something else than [question, answer]")
        turns += _pair(read_string(pair[0], "a question in history"), read_string(pair[1], "an answer in history"))
    return turns


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
