"""A conversation is the same in every shape, and one that cannot be used gives its reason."""

import itertools
import json
import re
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.data.types import Row, UnusableRowError
from tests.support.rows import HELLO, HI, WEATHER, call, calling, read, reason_of, result, turns_of


def test_text_parts_are_joined_and_empty_fields_are_ignored() -> None:
    parts = [{"type": "text", "text": "hel", "image_url": None}, {"type": "text", "text": "lo"}]
    turns = [
        HI | {"name": None, "tool_calls": [], "weight": None, "train": None},
        {
            "role": "assistant",
            "content": parts,
            "tool_calls": None,
            "refusal": None,
            "annotations": [],
            "x": {},
            "y": "",
        },
    ]
    assert turns_of({"messages": turns, "tools": None, "system": ""}) == [HI, HELLO]


def test_developer_is_system_and_function_is_tool() -> None:
    turns = [
        {"role": "developer", "content": "be brief"},
        HI,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Ulm"}'}},
        {"role": "function", "name": "weather", "content": "21 degrees"},
        HELLO,
    ]
    assert turns_of({"messages": turns}) == [
        {"role": "system", "content": "be brief"}, HI, calling(call(arguments={"city": "Ulm"})), result(name="weather"),
        HELLO,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_each_of_its_names(name: str) -> None:
    expected = [HI, HELLO | {"reasoning_content": "a greeting"}]
    assert turns_of({"messages": [HI, HELLO | {name: "a greeting"}]}) == expected
    assert turns_of({"messages": [HI, HELLO | {name: "a greeting", "reasoning_content": "a greeting"}]}) == expected


@pytest.mark.parametrize(
    ("flags", "untrained"),
    [
        ({"train": False}, {1}),
        ({"train": True}, set()),
        ({"weight": 0}, {1}),
        ({"weight": 0.0}, {1}),
        ({"weight": 1}, set()),
        ({"weight": 1.0, "train": True}, set()),
        ({"weight": 0, "train": False}, {1}),
        ({"weight": None, "train": None}, set()),
    ],
)
def test_train_and_weight_select_the_trained_answers(flags: dict[str, Any], untrained: set[int]) -> None:
    row = read({"messages": [HI | {"train": False, "weight": 0}, HELLO | flags, HI, HELLO]})
    assert (row.untrained, list(row.messages or ())) == (untrained, [HI, HELLO, HI, HELLO])


def test_untrained_answers_have_their_index_in_every_format() -> None:
    system = {"system": "be brief"}
    silent = HELLO | {"weight": 0}
    assert read({"messages": [HI, HELLO, HI, silent]} | system).untrained == {4}
    assert read({"conversations": [HI, {"from": "gpt", "value": "hello", "train": False}, HI, HELLO]}).untrained == {1}
    row = read({"prompt": [HI, silent, HI], "completion": [HELLO, HI, silent]})
    assert (row.untrained, row.loss_from) == ({1, 5}, 3)


TURNS = [
    ("hi", "messages is a string, expected a list of {role, content}"),
    (None, "messages is null, expected a list of {role, content}"),
    ([], "messages is an empty list"),
    ([HI, "hello"], "messages holds a string, expected {role, content}"),
    ([{}], "a turn in messages lacks role, content: found none, expected role, content"),
    ([{"role": "user"}], "a turn in messages lacks content: found role, expected role, content"),
    (
        [{"from": "human", "value": "hi"}],
        "a turn in messages lacks role, content: found from, value, expected role, content; "
        "data.columns: {conversations: messages} reads from, value",
    ),
    ([{"role": "human", "content": "hi"}], 'a turn has the role "human", expected system, user, assistant, tool'),
    ([{"role": ["user"], "content": "hi"}], "a turn has the role a list, expected system, user, assistant, tool"),
    ([{"role": None, "content": "hi"}], "a turn has the role null, expected system, user, assistant, tool"),
    ([{"role": "user", "content": 3}], "the content of a turn with role user is a number, expected a string"),
    (
        [HI, {"role": "assistant", "content": None}],
        "the content of a turn with role assistant is null, expected a string",
    ),
    ([{"role": "user", "content": "a\0"}], "the content of a turn with role user holds a NUL character"),
    (
        [{"role": "user", "content": "\ud83d"}],
        "the content of a turn with role user holds half a surrogate pair (a broken \\uD8xx escape)",
    ),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        "the content of a turn with role user has a part of type image_url, expected {type: text, text: ...}",
    ),
    (
        [{"role": "user", "content": ["hi"]}],
        "the content of a turn with role user has a part that is a string, expected {type: text, text: ...}",
    ),
    (
        [{"role": "user", "content": [{"type": "text"}]}],
        "the content of a turn with role user is null, expected a string",
    ),
    ([HI | {"name": "Ada"}], "a turn with role user has the field name, which training would lose; remove it"),
    ([HI | {"reasoning": "x"}], "a turn with role user has the field reasoning, which training would lose; remove it"),
    (
        [HI, HELLO | {"name": "x"}],
        "a turn with role assistant has the field name, which training would lose; remove it",
    ),
    (
        [HI, HELLO | {"score": 0}],
        "a turn with role assistant has the field score, which training would lose; remove it",
    ),
    (
        [HI, HELLO | {"reasoning": "a", "thinking": "b"}],
        "a turn has two different texts of reasoning, expected one of reasoning_content, reasoning, thinking",
    ),
    ([HI, HELLO | {"reasoning": ["a"]}], "reasoning is a list, expected a string"),
    ([HI, HELLO | {"weight": 0.5}], "weight of a turn is another number, expected 0 or 1"),
    ([HI, HELLO | {"weight": True}], "weight of a turn is true or false, expected 0 or 1"),
    ([HI, HELLO | {"weight": "1"}], "weight of a turn is a string, expected 0 or 1"),
    ([HI, HELLO | {"train": 1}], "train of a turn is a number, expected true or false"),
    ([HI, HELLO | {"train": True, "weight": 0}], "a turn has train and weight that contradict each other"),
    ([HI | {"train": True}, HELLO], "a turn with role user asks to be trained; only assistant turns can be"),
    ([HI | {"weight": 1}, HELLO], "a turn with role user asks to be trained; only assistant turns can be"),
    ([HI], "no assistant turn to learn from"),
    ([HELLO], "assistant turn at the start, expected system or user"),
    ([HI, HI, HELLO], "user turn after user, expected assistant"),
    ([HI, {"role": "assistant", "content": " \n"}], "empty assistant turn"),
    ([HI, {"role": "assistant", "content": "", "reasoning": "so"}], "empty assistant turn"),
    ([HI, HELLO, HI], "the conversation ends with a user turn, expected an assistant turn"),
    ([HI, calling(call()), result()], "the conversation ends with a tool turn, expected an assistant turn"),
    ([HI, calling(call()), HI, HELLO], "user turn after an assistant turn with tool_calls, expected tool"),
]


@pytest.mark.parametrize(("turns", "reason"), TURNS, ids=[reason[:60] for _, reason in TURNS])
def test_a_conversation_that_cannot_be_used_gives_its_reason(turns: Any, reason: str) -> None:
    assert reason_of({"messages": turns}) == reason


def test_the_order_of_roles_is_the_one_that_templates_accept() -> None:
    """Every order of up to six turns, against a regular expression: s system, u user, a answer, c calls, t result."""
    turns = {"s": {"role": "system", "content": "x"}, "u": HI, "a": HELLO, "c": calling(call()), "t": result()}
    num_accepted = 0
    for length in range(1, 7):
        for order in map("".join, itertools.product(turns, repeat=length)):
            try:
                read_turns = turns_of({"messages": [turns[letter] for letter in order]}, format_name="messages")
            except UnusableRowError:
                read_turns = []
            expected = bool(re.fullmatch("s?(u[ac](t+[ac])*)+", order)) and "cu" not in order
            assert bool(read_turns) == expected, order
            num_accepted += expected
    assert num_accepted == 46


def test_sharegpt_turns_with_calls_are_a_conversation() -> None:
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '[{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "now"}]'},
        {"from": "observation", "value": "21 degrees"},
        {"from": "tool", "value": "noon", "name": "now"},
        {"from": "gpt", "value": "hello", "weight": None, "thinking": "so"},
    ]
    row = read({"conversations": turns, "system": "be brief", "tools": json.dumps([WEATHER])})
    assert row.tools == (WEATHER,)
    assert list(row.messages or ()) == [
        {"role": "system", "content": "be brief"}, HI, calling(call(arguments={"city": "Ulm"}), call("now")), result(),
        result("noon", name="now"), HELLO | {"reasoning_content": "so"},
    ]  # fmt: skip


def test_conversations_may_have_turns_of_the_other_shape() -> None:
    assert turns_of({"conversations": [HI | {"from": None, "value": None}, HELLO]}) == [HI, HELLO]


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_system_column_is_the_first_turn_once(name: str) -> None:
    system = {"role": "system", "content": "be brief"}
    assert turns_of({name: [HI, HELLO], "system": "be brief"}) == [system, HI, HELLO]
    assert turns_of({name: [system, HI, HELLO], "system": "be brief"}) == [system, HI, HELLO]
    assert turns_of({name: [system, HI, HELLO], "system": " \n"}) == [system, HI, HELLO]
    reason = "the column system and the first turn are two different system prompts"
    assert reason_of({name: [system, HI, HELLO], "system": "be long"}) == reason
    assert reason_of({name: [HI, HELLO], "system": 3}) == "system is a number, expected a string"


SENDERS = "system, human, user, gpt, assistant, function_call, observation, tool"
SHAREGPT = [
    ("hi", "conversations is a string, expected a list of {from, value}"),
    ([{"from": "bing", "value": "hi"}], f'a turn is from "bing", expected {SENDERS}'),
    ([{"from": ["human"], "value": "hi"}], f"a turn is from no string, expected {SENDERS}"),
    (
        [{"from": "human"}],
        "a turn in conversations lacks value: found from, expected from, value",
    ),
    ([{"from": "human", "value": None}], "the content of a turn with role user is null, expected a string"),
    ([{"from": "human", "value": "hi", "role": "user"}], "a turn has both from and role, expected from, value"),
    (
        [{"from": "human", "value": "hi", "markdown": "x"}],
        "a turn with role user has the field markdown, which training would lose; remove it",
    ),
    ([{"from": "function_call", "value": "weather"}], "function_call is a string with broken JSON: Expecting value"),
    (
        [{"from": "function_call", "value": '{"name": "f"}', "tool_calls": [call()]}],
        "a turn has both from and tool_calls, expected from, value",
    ),
    ([{"from": "gpt", "value": "hi"}], "assistant turn at the start, expected system or user"),
]


@pytest.mark.parametrize(("turns", "reason"), SHAREGPT, ids=[reason[:60] for _, reason in SHAREGPT])
def test_sharegpt_turns_that_cannot_be_used_give_their_reason(turns: Any, reason: str) -> None:
    assert reason_of({"conversations": turns}) == reason


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NOT_BLANK = TEXTS.filter(str.strip)
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NOT_BLANK, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Conversations in the one shape that all are read into, without ids of calls."""
    turns: list[dict[str, Any]] = []
    if draw(st.booleans()):
        turns.append({"role": "system", "content": draw(NOT_BLANK)})
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(TEXTS)})
        if draw(st.booleans()):
            arguments = draw(st.lists(st.dictionaries(NOT_BLANK, JSON, max_size=3), min_size=1, max_size=2))
            turns.append(calling(*(call(draw(NOT_BLANK), one) for one in arguments)))
            turns += [result(draw(TEXTS)) for _ in arguments]
        turns.append({"role": "assistant", "content": draw(NOT_BLANK)})
        if draw(st.booleans()):
            turns[-1]["reasoning_content"] = draw(NOT_BLANK)
    return turns


def as_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in turn.items() if name not in ("role", "content", "tool_calls")}
    if "tool_calls" in turn:
        value = json.dumps([one["function"] for one in turn["tool_calls"]])
        return {"from": "function_call", "value": value, **others}
    senders = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    return {"from": senders[turn["role"]], "value": turn["content"], **others}


def with_arguments_as_json(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    functions = [one["function"] for one in turn["tool_calls"]]
    return turn | {"tool_calls": [call(one["name"], json.dumps(one["arguments"])) for one in functions]}


@given(conversations())
@settings(deadline=None)
def test_a_conversation_is_the_same_in_every_shape(turns: list[dict[str, Any]]) -> None:
    expected = Row("a.jsonl:1", messages=tuple(turns))  # type: ignore[arg-type]
    assert read({"messages": turns}) == expected
    assert read({"conversations": turns}) == expected
    assert read({"conversations": [as_sharegpt(turn) for turn in turns]}) == expected
    in_parts = [
        *turns[:-1],
        turns[-1] | {"content": [{"type": "text", "text": letter} for letter in turns[-1]["content"]]},
    ]
    assert read({"messages": in_parts}) == expected
    halves = read({"prompt": turns[:1], "completion": turns[1:]})
    assert (halves.messages, halves.loss_from) == (expected.messages, 1)


@given(conversations())
@settings(max_examples=40, deadline=None)
def test_a_conversation_is_the_same_from_a_file_with_one_schema_for_all_turns(turns: list[dict[str, Any]]) -> None:
    """Arrow gives every turn the fields of all turns; arguments, which may differ in type, come as JSON."""
    table = pyarrow.Table.from_pylist([{"messages": [with_arguments_as_json(turn) for turn in turns]}])
    (row,) = table.to_pylist()
    assert len({tuple(turn) for turn in row["messages"]}) == 1
    assert turns_of(row) == turns


def test_objects_that_arrow_filled_up_are_what_they_were() -> None:
    now = {"name": "now", "parameters": {"type": "object", "properties": {}}}
    rows = [
        {
            "messages": [HI, calling(call(arguments={"city": "Ulm", "days": [1]})), result(tool_call_id=""), HELLO],
            "tools": [WEATHER],
        },
        {
            "messages": [HI, calling(call("now", {"zone": "UTC"}, id="x")), result(tool_call_id="x"), HELLO],
            "tools": [now],
        },
    ]
    filled = pyarrow.Table.from_pylist(rows).to_pylist()
    assert filled != rows
    for plain, row in zip(rows, filled, strict=True):
        assert read(row).messages == read(plain).messages
    assert read(filled[0]).tools == (WEATHER,)
