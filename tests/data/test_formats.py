"""Columns decide the format of a file, and each format has its reader."""

import itertools
import json
import logging
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.config.schema import FORMATS as FORMAT_NAMES
from qlora_train.data.formats import FORMATS, check_renames, recognise
from qlora_train.data.row_reader import RowReader
from qlora_train.data.types import Record, Row, UnusableRowError
from qlora_train.utils.errors import ConfigError, DataError
from tests.support.rows import HELLO, HI, WEATHER, chat, read, reason_of, turns_of

EXAMPLES = Path(__file__).parents[2] / "data" / "examples"


def test_every_format_of_the_config_has_a_reader_and_no_other_has() -> None:
    assert {"auto", *FORMATS} == set(get_args(FORMAT_NAMES))


ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [HI, HELLO]},
    "conversations": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "prompt_completion": {"prompt": "hi", "completion": "hello"},
    "alpaca": {"instruction": "hi", "output": "hello"},
    "question_answer": {"question": "hi", "answer": "hello"},
    "text": {"text": "hi"},
    "tokens": {"input_ids": [1, 2]},
}
"""A row of each format with the columns that must be there."""
EXPECTED: dict[str, Row] = {
    **dict.fromkeys(ROWS, Row("a.jsonl:1", messages=tuple(chat("hi", "hello")))),  # type: ignore[arg-type]
    "prompt_completion": Row("a.jsonl:1", prompt="hi", text="hello"),
    "text": Row("a.jsonl:1", text="hi"),
    "tokens": Row("a.jsonl:1", input_ids=(1, 2), loss_mask=(True, True)),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("renamed", [True, False])
def test_every_format_is_recognised_named_and_renamed(name: str, forced: bool, renamed: bool) -> None:
    columns = {column: f"the {column}" for column in ROWS[name]} if renamed else {}
    values = {columns.get(column, column): value for column, value in ROWS[name].items()}
    read_row = read({"id": 7, "source": "x", **values}, columns, name if forced else "auto")
    assert read_row == EXPECTED[name]


def test_columns_beside_a_format_do_not_disturb_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "qlora_train"):
        assert turns_of({"prompt": "hi", "prompt_id": "3f", "messages": [HI, HELLO]}) == [HI, HELLO]
    assert "a.jsonl:1: format messages; columns not used: prompt, prompt_id" in caplog.text


@pytest.mark.parametrize(("one", "other"), itertools.combinations(ROWS, 2))
def test_columns_that_fit_two_formats_are_refused_until_one_is_named(one: str, other: str) -> None:
    values = ROWS[one] | ROWS[other]
    with pytest.raises(DataError, match=f"fit {one} and {other}; set data.format to the one that is meant"):
        read(values)
    assert (read(values, format_name=one), read(values, format_name=other)) == (EXPECTED[one], EXPECTED[other])


def test_a_renaming_decides_between_two_formats() -> None:
    values = {"question": "hi", "answer": "hello"}
    assert read(values, {"prompt": "question", "completion": "answer"}) == EXPECTED["prompt_completion"]
    assert read(values, {"instruction": "question", "output": "answer"}) == EXPECTED["alpaca"]
    assert read(values) == EXPECTED["question_answer"]
    assert read({"text": [HI, HELLO]}, {"messages": "text"}) == EXPECTED["messages"]


def test_a_column_is_read_once_where_a_renaming_gives_it_to_another() -> None:
    assert turns_of({"input": "hi", "output": "hello"}, columns={"instruction": "input"}) == [HI, HELLO]
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert read({"prompt": "hello", "completion": "hi"}, swapped) == EXPECTED["prompt_completion"]


def test_columns_that_fit_no_format_are_answered_with_the_nearest_name() -> None:
    with pytest.raises(DataError) as caught:
        read({"conversation": [HI], "id": 3})
    assert str(caught.value) == (
        "a.jsonl:1: found the columns conversation, id; expected messages, or conversations, or prompt + completion, or "
        "instruction + output, or question + answer, or text, or input_ids; rename with data.columns: {conversations: "
        "conversation}"
    )
    with pytest.raises(DataError, match=r"rename with data.columns: \{completion: Completions\}"):
        read({"prompt": "hi", "Completions": "hello"})
    with pytest.raises(DataError, match=r"rename with data.columns, e.g. \{prompt: request, completion: reply\}$"):
        read({"x": 1})


def test_a_row_without_a_column_of_the_format_is_an_error_with_the_nearest_name() -> None:
    reader = RowReader("prompt_completion", {"prompt": "request"})
    with pytest.raises(DataError) as caught:
        reader.read(Record("a.jsonl:9", {"request": "hi", "complet": "hello"}))
    assert str(caught.value) == (
        "a.jsonl:9: the column completion of the format prompt_completion is missing; found request, complet; did you "
        "mean data.columns: {completion: complet}?"
    )
    with pytest.raises(DataError, match="the column request of the format prompt_completion is missing"):
        reader.read(Record("a.jsonl:10", {"prompt": "hi", "completion": "hello"}))


def test_an_unknown_renaming_is_refused_with_the_allowed_names() -> None:
    with pytest.raises(ConfigError) as caught:
        check_renames("question_answer", {"prompt": "q"}, "language_modeling")
    assert str(caught.value) == (
        "data.columns: 'prompt' is not a column of the format question_answer; allowed: question, answer, context, tools, "
        "system, chat_template_kwargs (the format's name comes first, then the file's)"
    )
    with pytest.raises(
        ConfigError, match=r"^data.train.columns: 'x' is not .* auto; allowed: messages, tools, system, "
    ):
        check_renames("auto", {"x": "q"}, "language_modeling", "data.train.columns")
    check_renames("auto", {"prompt": "q", "completion": "a", "question": "q"}, "language_modeling")


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^data.columns: prompt and completion are both called x; expected a column of"
    ):
        check_renames("auto", {"completion": "x", "prompt": "x"}, "language_modeling")


def test_a_renamed_column_counts_as_unseen_until_a_row_has_it() -> None:
    reader = RowReader("alpaca", {"input": "context", "output": "reply", "prompt": "elsewhere"})
    assert reader.unseen == {"input": "context", "output": "reply"}
    reader.read(Record("a.jsonl:1", {"instruction": "bow", "reply": "ok"}))
    assert reader.unseen == {"input": "context"}
    reader.read(Record("a.jsonl:2", {"instruction": "add", "context": "1 2", "reply": "3"}))
    reader.read(Record("a.jsonl:3", {"instruction": "bow", "reply": "ok"}))
    assert reader.unseen == {}


def test_a_renaming_that_the_recognised_format_does_not_use_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qlora_train"):
        read({"text": "add 2"}, {"prompt": "question"})
    assert "a.jsonl:1: read as text, where data.columns {prompt: question} has no effect" in caplog.text


def test_a_reader_goes_to_another_process_as_it_is() -> None:
    reader = RowReader("text", {"text": "body"})
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(Record("a.jsonl:1", {"body": "hi"})) == EXPECTED["text"]
    assert (copy.unseen, reader.unseen) == ({}, {"text": "body"})


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("chat", "messages"),
        ("tools", "messages"),
        ("conversations", "conversations"),
        ("completion", "prompt_completion"),
        ("instruction", "alpaca"),
        ("questions", "question_answer"),
        ("text", "text"),
    ],
)
def test_every_bundled_row_is_usable_and_unique(file: str, name: str) -> None:
    lines = (EXAMPLES / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [read(json.loads(line)) for line in lines]
    assert recognise(Record("", json.loads(lines[0])), "auto", {}, "language_modeling") == name
    assert len(rows) == len({repr(row) for row in rows}) >= 20
    assert not any(row.warnings for row in rows)


def test_prompt_and_completion_lists_are_one_conversation_with_loss_on_the_completion() -> None:
    turns = chat("a", "b", "c", "d")
    row = read({"prompt": turns[:3], "completion": turns[3:], "tools": [WEATHER]})
    assert (list(row.messages or ()), row.loss_from, row.tools) == (turns, 3, (WEATHER,))


def test_a_system_column_precedes_a_prompt_of_turns() -> None:
    row = read({"prompt": chat("a", "b", "c"), "completion": [HELLO], "system": "In French."})
    expected = [{"role": "system", "content": "In French."}, *chat("a", "b", "c"), HELLO]
    assert (list(row.messages or ()), row.loss_from) == (expected, 4)


@pytest.mark.parametrize("column", ["tools", "system", "chat_template_kwargs"])
def test_columns_for_chat_templates_are_refused_beside_plain_text(
    column: str,
) -> None:
    filled: dict[str, Any] = {
        "tools": [WEATHER],
        "system": "In French.",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    values = {"prompt": "hi", "completion": "hello", column: filled[column]}
    assert reason_of(values) == (
        f"{column} beside a prompt that is a string, to which no chat template is applied; data.columns: {{question: "
        "prompt, answer: completion} makes turns of it"
    )
    row = read(values, {"question": "prompt", "answer": "completion"})
    assert [turn["content"] for turn in row.messages or ()][-2:] == ["hi", "hello"]
    assert (list(row.tools), row.chat_template_kwargs, (row.messages or ())[0]["content"]) == (
        [WEATHER] if column == "tools" else [], filled[column] if column == "chat_template_kwargs" else {},
        "In French." if column == "system" else "hi",
    )  # fmt: skip


@pytest.mark.parametrize("value", [{"enable_thinking": False, "unused": None}, '{"enable_thinking": false}'])
@pytest.mark.parametrize("name", ["messages", "conversations", "alpaca", "question_answer"])
def test_variables_of_the_chat_template_are_read_with_every_conversation(name: str, value: Any) -> None:
    assert read(ROWS[name] | {"chat_template_kwargs": value}).chat_template_kwargs == {"enable_thinking": False}
    assert read(ROWS[name] | {"chat_template_kwargs": None}) == EXPECTED[name]


@pytest.mark.parametrize("name", ["messages", "conversations", "prompt_completion", "alpaca", "question_answer"])
def test_an_undesirable_answer_is_refused_and_a_desirable_one_gets_a_warning(name: str) -> None:
    for column in ("label", "kto_tag"):
        for value in (False, "false", "False"):
            assert reason_of(ROWS[name] | {column: value}) == (
                f"{column} is false, which marks an undesirable answer: train.objective: kto trains on both kinds, sft on "
                "rows whose label is true"
            )
        for value in (True, "True"):
            assert read(ROWS[name] | {column: value}).warnings == (
                f"{column} is true, and the row is trained as any other (train.objective: kto reads it)",
            )


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_with_media_is_refused(name: str, column: str) -> None:
    for value in ("a.png", ["a.png"], [{"bytes": b"x", "path": None}]):
        assert reason_of(ROWS[name] | {column: value}) == (
            f"the column {column} holds what a text model does not see; leave the row out, or the column where no answer "
            "depends on it"
        )
    for nothing in (None, "", []):
        assert read(ROWS[name] | {column: nothing}) == EXPECTED[name]


OF_TURNS = {
    "system_prompt": "data.columns: {system: system_prompt} makes it the system turn",
    "functions": "data.columns: {tools: functions} gives it to the chat template",
    "rejected": "train.objective: sft trains on one answer",
    "documents": "answers may depend on it",
    "rationale": "reasoning is read in a turn, as reasoning_content",
    "weight": "rows of a source weigh the same",
}


@pytest.mark.parametrize("column", OF_TURNS)
def test_a_column_that_may_matter_gets_a_warning_where_a_row_fills_it(column: str) -> None:
    row = read(ROWS["messages"] | {column: "x", "id": "7", "source": "y"})
    assert row.warnings == (f"the column {column} is not used: {OF_TURNS[column]}",)
    assert read(ROWS["text"] | {column: "x"}).warnings == (f"the column {column} is not used",)
    assert read(ROWS["messages"] | {column: ""}).warnings == ()
    assert read({"messages": [HI, HELLO], "answers": [1]} | {column: ""}, {"system": column}).warnings == ()


TURNS = "reads them as a user and an assistant turn"
SHAPES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "Dolly": (
        {"instruction": "What?", "context": "It is so.", "response": "So.", "category": "qa"},
        {"output": "response", "input": "context"},
    ),
    "query and response": ({"query": "What?", "response": "So."}, {"question": "query", "answer": "response"}),
    "ms-swift": (
        {"query": "What?", "response": "So.", "history": [["Which?", "This."]], "system": "Be brief."},
        {"instruction": "query", "output": "response"},
    ),
    "input and output": ({"input": "What?", "output": "So."}, {"question": "input", "answer": "output"}),
    "OpenOrca": (
        {"id": "1", "system_prompt": "Be brief.", "question": "What?", "response": "So."},
        {"answer": "response", "system": "system_prompt"},
    ),
    "problem and solution": ({"problem": "What?", "solution": "So."}, {"question": "problem", "answer": "solution"}),
    "prompt and response": ({"prompt": "What?", "response": "So."}, {"question": "prompt", "answer": "response"}),
}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "strings": ({"prompt": "What?", "chosen": "So.", "rejected": "No."}, {}),
    "question": ({"question": "What?", "chosen": "So.", "rejected": "No."}, {}),
    "question as plain text": ({"question": "What?", "chosen": "So.", "rejected": "No."}, {"prompt": "question"}),
    "instruction": ({"instruction": "What?", "chosen": "So.", "rejected": "No."}, {"question": "instruction"}),
    "turns and two strings": ({"prompt": chat("What?"), "chosen": "So.", "rejected": "No."}, {}),
    "answers by name": (
        {"prompt": "What?", "chosen_response": "So.", "rejected_response": "No."},
        {"chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    "conversations": ({"chosen": chat("What?", "So."), "rejected": chat("What?", "No.")}, {}),
    "conversations and their prompt": (
        {"prompt": "What?", "chosen": chat("What?", "So."), "rejected": chat("What?", "No."), "score_chosen": 9.0},
        {},
    ),
    "conversations with a system turn beside their prompt": (
        {
            "prompt": "What?",
            "chosen": [{"role": "system", "content": "Be brief."}, *chat("What?", "So.")],
            "rejected": [{"role": "system", "content": "Be brief."}, *chat("What?", "No.")],
        },
        {},
    ),
    "turns behind a prompt": (
        {"prompt": chat("What?"), "chosen": chat("What?", "So.")[1:], "rejected": chat("What?", "No.")[1:]},
        {},
    ),
    "ShareGPT": (
        {
            name: [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
            for name, answer in (("chosen", "So."), ("rejected", "No."))
        },
        {},
    ),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "What?"}],
            "chosen": {"from": "gpt", "value": "So."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"prompt": "conversations"},
    ),
}


def text_of(row: Row) -> str:
    turns = "\n".join(turn["content"] for turn in row.messages or ())
    return f"{turns}{row.prompt or ''}{row.text or ''}"


def shown(columns: dict[str, str]) -> str:
    return "{" + ", ".join(f"{column}: {name}" for column, name in columns.items()) + "}"


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_are_answered_with_renames_that_read_all_of_them(name: str) -> None:
    values, columns = SHAPES[name]
    with pytest.raises(DataError) as caught:
        read(values)
    assert str(caught.value).endswith(f"; data.columns: {shown(columns)} {TURNS}")
    row = read(values, columns)
    texts = ["It is so.", "Be brief.", "This.", "What?", "So."]
    assert all(text in text_of(row) for text in texts if text in json.dumps(values))
    assert row.warnings == ()


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_read_for_preferences_and_never_renamed_for_sft(name: str) -> None:
    values, columns = PAIRS[name]
    row = read(values, columns, dataset_type="preference")
    assert row.rejected is not None
    both = [text_of(each).split("What?", 1)[1].strip() for each in (row, row.rejected)]
    assert both == ["So.", "No."]
    renames = f"data.columns: {shown(columns)}" if columns else ""
    if name == "LLaMA-Factory":
        assert reason_of(values).endswith(f"set train.objective: dpo with data.format: preference and {renames}")
        return
    with pytest.raises(DataError) as caught:
        read(values)
    assert ": preference pairs; set train.objective: dpo (or another of its family)" in str(caught.value)
    if name != "question as plain text":
        assert str(caught.value).endswith(f"){' and ' * bool(renames)}{renames}, or give rows with one answer")


PREFERENCE_REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "equal answers": (
        {"chosen": chat("What?", "So."), "rejected": chat("What?", "So.")},
        "chosen and rejected do not differ in an answer",
    ),
    "other prompts": (
        {"chosen": chat("What?", "So."), "rejected": chat("Who?", "No.")},
        "chosen and rejected differ before their answers; expected one prompt for both",
    ),
    "no answer": (
        {"chosen": chat("What?", "So."), "rejected": chat("What?")},
        "chosen and rejected do not differ in an answer",
    ),
    "texts without a prompt": (
        {"prompt": "", "chosen": "Human: a", "rejected": "Human: b"},
        "chosen and rejected are strings without a prompt; expected a column prompt beside them, or turns that begin with "
        "Human: and Assistant:",
    ),
    "two system turns": (
        {
            "prompt": "What?",
            "chosen": [{"role": "system", "content": "Be brief."}, *chat("What?", "So.")],
            "rejected": [{"role": "system", "content": "Be long."}, *chat("What?", "No.")],
        },
        "chosen and rejected begin with different system turns, or ones that prompt lacks; expected the same in both",
    ),
    "empty": ({"prompt": "What?", "chosen": " ", "rejected": "No."}, "chosen is empty"),
    "mixed": (
        {"prompt": "What?", "chosen": "So.", "rejected": chat("What?", "No.")},
        "chosen is a string and rejected is a list, expected two strings or two lists of {role, content}",
    ),
    "system beside strings": (
        {"prompt": "What?", "chosen": "So.", "rejected": "No.", "system": "Be brief."},
        "system beside a prompt that is a string, to which no chat template is applied; data.columns: {question: prompt} "
        "makes turns of it",
    ),
}


@pytest.mark.parametrize("name", PREFERENCE_REASONS)
def test_a_pair_that_cannot_be_compared_is_refused_with_the_reason(name: str) -> None:
    values, reason = PREFERENCE_REASONS[name]
    with pytest.raises(UnusableRowError) as caught:
        read(values, dataset_type="preference")
    assert caught.value.reason == reason


def openai_pair(**changed: Any) -> dict[str, Any]:
    """Return a row of OpenAI's preference fine-tuning."""
    request = {"messages": chat("What?"), "tools": [], "parallel_tool_calls": True}
    answers = {"preferred_output": chat("What?", "So.")[1:], "non_preferred_output": chat("What?", "No.")[1:]}
    return {"input": request, **answers, **changed}


def test_a_pair_of_openai_is_the_pair_of_its_request_and_its_two_answers() -> None:
    expected = {"prompt": chat("What?"), "chosen": chat("What?", "So.")[1:], "rejected": chat("What?", "No.")[1:]}
    assert read(openai_pair(), dataset_type="preference") == read(expected, dataset_type="preference")
    with_tools = openai_pair(
        input={"messages": chat("What?"), "tools": [{"type": "function", "function": {"name": "f"}}]}
    )
    assert [tool["function"]["name"] for tool in read(with_tools, dataset_type="preference").tools] == ["f"]
    with pytest.raises(DataError, match=r"the format openai_preference; set train\.objective: dpo"):
        read(openai_pair())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"input": "What?"}, "input is a string, expected an object with messages, a list of turns"),
        ({"input": {"messages": chat("What?"), "response_format": {"type": "json_object"}}},
         "input has the field response_format, which training would lose; remove it"),
        ({"preferred_output": "So."}, "preferred_output is a string, expected a list of {role, content}"),
        ({"non_preferred_output": chat("What?", "So.")[1:]},
         "preferred_output and non_preferred_output do not differ in an answer"),
    ],
)  # fmt: skip
def test_a_pair_of_openai_that_cannot_be_read_is_refused_in_its_own_words(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRowError) as caught:
        read(openai_pair(**changed), dataset_type="preference")
    assert caught.value.reason == reason


def openai_turns(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "What?"}, *turns], **columns}


OPENAI_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "image": (
        {"messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]},
            {"role": "assistant", "content": "A cat."},
        ]},
        "the content of a turn with role user has a part of type image_url, expected {type: text, text: ...}",
    ),
    "weight beyond 0 and 1": (
        openai_turns({"role": "assistant", "content": "So.", "weight": 2}),
        "weight of a turn is another number, expected 0 or 1",
    ),
    "no trained answer at the end": (
        {"messages": [{"role": "user", "content": "What?"}], "reference_answer": "So."}, "no assistant turn to learn from"
    ),
    "name of a user": (
        {"messages": [{"role": "user", "content": "What?", "name": "ida"}, {"role": "assistant", "content": "So."}]},
        "a turn with role user has the field name, which training would lose; remove it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPENAI_CHATS)
def test_a_chat_of_openai_that_a_text_model_cannot_learn_is_refused_with_the_reason(name: str) -> None:
    values, reason = OPENAI_CHATS[name]
    with pytest.raises(UnusableRowError) as caught:
        read(values)
    assert caught.value.reason == reason


def test_fields_of_openais_chats_are_read() -> None:
    bad = {"role": "assistant", "content": "No.", "weight": 0, "refusal": None, "annotations": []}
    row = read(
        openai_turns(bad, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "So.", "weight": 1})
    )
    assert row.untrained == {1}
    called = {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}}
    legacy = openai_turns(
        called, {"role": "function", "name": "now", "content": "12:00"}, {"role": "assistant", "content": "Noon."},
        functions=[{"name": "now", "parameters": {"type": "object", "properties": {}}}],
    )  # fmt: skip
    row = read(legacy, {"tools": "functions"})
    assert [tool["function"]["name"] for tool in row.tools] == ["now"]
    assert [turn["role"] for turn in row.messages or ()] == ["user", "assistant", "tool", "assistant"]
    (warning,) = read(legacy).warnings
    assert warning.endswith("data.columns: {tools: functions} gives it to the chat template")


def test_only_answers_behind_the_common_turns_are_trained() -> None:
    chosen, rejected = chat("a", "b", "c", "So."), chat("a", "b", "c", "No.")
    row = read({"chosen": chosen, "rejected": rejected}, dataset_type="preference")
    assert row.rejected is not None
    assert (row.loss_from, row.rejected.loss_from) == (3, 3)
    with_system = read({"chosen": chosen, "rejected": rejected, "system": "Be brief."}, dataset_type="preference")
    assert (with_system.loss_from, len(with_system.messages or ())) == (4, 5)


def test_rows_of_another_objective_are_refused_with_the_one_they_are_for() -> None:
    with pytest.raises(DataError) as caught:
        read({"messages": [HI, HELLO]}, dataset_type="preference")
    assert str(caught.value).endswith(
        "the format messages; set train.objective: sft, or give pairs of a chosen and a rejected answer"
    )
    with pytest.raises(DataError, match=r"the format messages is for another objective; set train\.objective: sft, or"):
        read({"chosen": [], "rejected": []}, format_name="messages", dataset_type="preference")


def test_the_shape_of_gsm8k_is_read_as_it_is() -> None:
    assert turns_of({"question": "What?", "answer": "1 + 1 = 2\n#### 2"}) == chat("What?", "1 + 1 = 2\n#### 2")


@pytest.mark.parametrize(
    "values",
    [
        {"context": "a", "title": "b"}, {"input": "a"}, {"inputs": "a", "labels": "b"}, {"message": "a"},
        {"question": "a", "context": "b", "answers": {"text": ["c"]}}, {"prompt": "a"}, {"Prompts": "a", "answer": "b"},
        {"instruction": "a", "question": "b", "response": "c"}, {"question": "a", "response": "b", "output": "c"},
    ],
)  # fmt: skip
def test_no_rename_is_advised_that_would_lose_half_of_a_row_or_read_another_thing(values: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"; rename with data.columns, e.g. \{prompt: request, completion: reply\}$"):
        read(values)
    with pytest.raises(DataError, match=r"is missing; found [a-zA-Z, ]+$"):
        RowReader("text", {}).read(Record("a.jsonl:1", values))


ALPACA: list[tuple[dict[str, Any], list[str]]] = [
    ({"instruction": "add", "input": "1 2", "output": "3"}, ["add\n\n1 2", "3"]),
    ({"instruction": "greet", "input": "", "output": "hi"}, ["greet", "hi"]),
    ({"instruction": "bow", "input": None, "output": "ok"}, ["bow", "ok"]),
    ({"instruction": " bow ", "input": " \n", "output": "ok"}, [" bow ", "ok"]),
    ({"instruction": "", "input": "1 2", "output": "3"}, ["1 2", "3"]),
    ({"instruction": " ", "input": "", "output": "3"}, [" ", "3"]),
    ({"instruction": "c", "history": [["a", "b"], ["", "x"]], "output": "d"}, ["a", "b", "", "x", "c", "d"]),
    ({"instruction": "c", "history": [], "output": "d"}, ["c", "d"]),
    ({"instruction": "c", "history": None, "output": "d", "system": None}, ["c", "d"]),
    ({"question": "who?", "answer": "me"}, ["who?", "me"]),
    ({"question": "who?", "context": "It was me.", "answer": "me"}, ["It was me.\n\nwho?", "me"]),
    ({"question": " ", "context": None, "answer": "me"}, [" ", "me"]),
]


@pytest.mark.parametrize(("values", "contents"), ALPACA)
def test_single_questions_become_conversations(values: dict[str, Any], contents: list[str]) -> None:
    assert turns_of(values) == chat(*contents)
    assert turns_of(values | {"system": "be brief"}) == [{"role": "system", "content": "be brief"}, *chat(*contents)]


OTHERS = [
    ({"prompt": "a", "completion": " \n"}, "completion is empty"),
    ({"prompt": None, "completion": "a"}, "prompt is null, expected a string"),
    ({"prompt": "a", "completion": 3}, "completion is a number, expected a string"),
    (
        {"prompt": [HI], "completion": "hello"},
        "prompt is a list and completion is a string, expected two strings or two lists of {role, content}",
    ),
    ({"prompt": [], "completion": [HELLO]}, "prompt is an empty list"),
    ({"prompt": [HI], "completion": []}, "completion is an empty list"),
    ({"prompt": [HI, HELLO], "completion": [HI]}, "the conversation ends with a user turn, expected an assistant turn"),
    (
        {"prompt": "a", "completion": "b", "tools": [WEATHER]},
        "tools beside a prompt that is a string, to which no chat template is applied; data.columns: {question: prompt, "
        "answer: completion} makes turns of it",
    ),
    (
        {"messages": [HI, HELLO], "chat_template_kwargs": [1]},
        "chat_template_kwargs is a list, expected an object",
    ),
    (
        {"messages": [HI, HELLO], "chat_template_kwargs": {"tokenize": True, "enable_thinking": False}},
        "chat_template_kwargs sets tokenize, expected variables of the chat template only",
    ),
    ({"instruction": None, "output": "a"}, "instruction is null, expected a string"),
    ({"instruction": "a", "output": ""}, "empty assistant turn"),
    ({"instruction": "a", "output": "b", "input": ["x"]}, "input is a list, expected a string"),
    ({"instruction": "a", "output": "b", "history": "x"}, "history is a string, expected a list of [question, answer]"),
    (
        {"instruction": "a", "output": "b", "history": [["x"]]},
        "history holds something else than [question, answer]",
    ),
    ({"instruction": "a", "output": "b", "history": [["x", None]]}, "an answer in history is null, expected a string"),
    ({"instruction": "a", "output": "b", "history": [["x", ""]]}, "empty assistant turn"),
    ({"question": "a", "answer": {"text": ["b"]}}, "answer is an object, expected a string"),
    ({"question": "a", "answer": "b", "context": {"title": "x"}}, "context is an object, expected a string"),
    ({"text": " \n"}, "text is empty"),
    ({"text": None}, "text is null, expected a string"),
    ({"text": "a\0b"}, "text holds a NUL character"),
    ({"text": "\udc00"}, "text holds half a surrogate pair (a broken \\uD8xx escape)"),
]


@pytest.mark.parametrize(("values", "reason"), OTHERS, ids=[reason[:60] for _, reason in OTHERS])
def test_a_value_that_cannot_be_used_gives_its_reason(values: dict[str, Any], reason: str) -> None:
    assert reason_of(values) == reason


KEYS = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "weight"]
WORDS = ["user", "assistant", "tool", "function", "text", "[]", "{}", '{"name": "f"}']
ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=2),
        st.sampled_from(WORDS),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.sampled_from(sorted(FORMATS)), st.data())
@settings(max_examples=300, deadline=None)
def test_any_row_is_read_or_refused_with_a_short_reason(name: str, data: st.DataObject) -> None:
    optional = data.draw(st.sets(st.sampled_from([*FORMATS[name].required, *FORMATS[name].optional])))
    values = {column: data.draw(ANYTHING) for column in {*FORMATS[name].required, *optional}}
    if name in ("messages", "conversations"):
        values[name] = [HI, data.draw(ANYTHING), HELLO]
    reason: str | None = None
    row = Row("")
    try:
        row = RowReader(name, {}).read(Record("a.jsonl:1", values))
    except UnusableRowError as error:
        reason = error.reason
    if reason is None:
        assert sum(field is not None for field in (row.messages, row.text, row.input_ids)) == 1
    else:
        assert 0 < len(reason) <= 203
