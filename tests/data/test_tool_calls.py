"""Tools and calls have one shape whatever a row holds, and results answer calls."""

import datetime
import itertools
import json
from typing import Any

import pytest

from qlora_train.data.row_encoder import RowEncoder
from qlora_train.data.types import UnusableRowError
from tests.support.pico import build_tokenizer
from tests.support.rows import HELLO, HI, WEATHER, call, calling, read, reason_of, result, turns_of


def test_tools_and_calls_have_one_shape_whatever_the_row_holds() -> None:
    inner, arguments = WEATHER["function"], {"city": "Ulm"}
    assert isinstance(inner, dict)
    tools = [
        [WEATHER], [inner], [{"function": inner}], [{"type": "function", **inner}], json.dumps([WEATHER]),
        [json.dumps(WEATHER)], json.dumps([inner]), [{**WEATHER, "type": None}], [{"function": inner, "type": "function"}],
    ]  # fmt: skip
    calls = [
        call(arguments=arguments), call(arguments=json.dumps(arguments)), {"name": "weather", "arguments": arguments},
        {"function": {"name": "weather", "arguments": json.dumps(arguments)}}, call(arguments=arguments, index=0),
        call(arguments=arguments, id=None), {"function": None, "name": "weather", "arguments": arguments},
        call(arguments=arguments | {"unit": None}),
    ]  # fmt: skip
    fields = [[one] for one in calls] + [json.dumps([one]) for one in calls[:3]] + [json.dumps(calls[2]), calls[2]]
    expected = [HI, calling(calls[0]), result(), HELLO]
    for tool, field in itertools.zip_longest(tools, fields, fillvalue=tools[0]):
        turns = [HI, {"role": "assistant", "tool_calls": field}, result(), HELLO]
        row = read({"messages": turns, "tools": tool})
        assert (list(row.messages or ()), row.tools, list(row.tools[0])) == (expected, (WEATHER,), ["type", "function"])


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null", {}])
def test_empty_tools_are_no_tools(tools: Any) -> None:
    row = read({"messages": [HI, HELLO], "tools": tools})
    assert (list(row.messages or ()), row.tools) == ([HI, HELLO], ())


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "now", "arguments": arguments}]}
    assert turns_of({"messages": [HI, turn]}) == [HI, calling(call("now"))]
    assert turns_of({"messages": [HI, calling({"name": "now"}, content="Let me see.")]})[1]["content"] == "Let me see."


def test_a_null_argument_is_kept_in_a_string_and_left_out_of_an_object() -> None:
    def arguments(field: Any) -> Any:
        return turns_of({"messages": [HI, calling() | {"tool_calls": field}]})[1]["tool_calls"][0]["function"][
            "arguments"
        ]

    given = {"a": None, "b": [{"c": None, "d": 1}], "e": [None]}
    assert arguments([call(arguments=json.dumps(given))]) == given
    assert arguments(json.dumps([call(arguments=given)])) == given
    assert arguments([call(arguments=given)]) == {"b": [{"d": 1}], "e": [None]}


def test_parallel_calls_are_answered_in_any_order() -> None:
    calls = calling(call(id="a"), call(id="b"), call(id="c"))
    for order in itertools.permutations("abc"):
        turns = [HI, calls, *(result(tool_call_id=one) for one in order), HELLO]
        assert turns_of({"messages": turns}) == turns


FOREIGN = "a tool turn has a tool_call_id that no open call of the assistant turn before has"
CALL_TURNS = [
    ([calling(call(id="a")), result(tool_call_id="b"), HELLO], FOREIGN),
    ([calling(call(id="a")), result(tool_call_id="a"), result(tool_call_id="a"), HELLO], FOREIGN),
    ([calling(call(id="a")), result(), calling(call(id="b")), result(tool_call_id="a"), HELLO], FOREIGN),
    ([calling(call()), result(tool_call_id="a"), HELLO], FOREIGN),
    ([HELLO, result(tool_call_id="a"), HELLO], FOREIGN),
    ([calling(call()), result() | {"tool_call_id": 3}, HELLO], "tool_call_id is a number, expected a string"),
]


@pytest.mark.parametrize(("turns", "reason"), CALL_TURNS)
def test_a_result_that_answers_no_open_call_is_refused(turns: list[Any], reason: str) -> None:
    assert reason_of({"messages": [HI, *turns]}) == reason


def test_calls_written_into_the_text_may_have_results() -> None:
    turns = [HI, {"role": "assistant", "content": "<call>weather</call>"}, result(), HELLO]
    assert turns_of({"messages": turns}) == turns


LOSSY = "a field twice, NaN or Infinity, or a number with too many digits"
CALLS = [
    ("weather", "tool_calls is a string with broken JSON: Expecting value"),
    ('[{"name": "f", "name": "g"}]', "tool_calls is a string with broken JSON: " + LOSSY),
    (3, "tool_calls is a number, expected a list of calls"),
    ("[]", "tool_calls is an empty list, expected a list of calls"),
    (["f"], "tool_calls holds a string, expected {name, arguments}"),
    ([{}], "a call in tool_calls has no name"),
    ([call("")], "a call in tool_calls has no name"),
    ([{"function": "f"}], "a call in tool_calls has no name"),
    ([call(3)], "the name of a call in tool_calls is a number, expected a string"),  # type: ignore[arg-type]
    ([call(type="custom")], "tool_calls holds a call of another type than function"),
    (
        [call() | {"function": {"name": "f", "parameters": {"x": 1}}}],
        "a call in tool_calls has the field parameters, which training would lose; expected {name, arguments}",
    ),
    (
        [call(cost=3)],
        "a call in tool_calls has the field cost, which training would lose; expected {name, arguments}",
    ),
    ([call(id=3)], "the id of a call in tool_calls is a number, expected a string"),
    ([call(arguments="{city: Ulm}")], None),
    ([call(arguments="[1]")], "arguments is a list, expected an object"),
    ([call(arguments='"{}"')], "arguments is a string, expected an object"),
    ([call(arguments=[1])], "arguments is a list, expected an object"),
    ([call(arguments='{"x": NaN}')], "arguments is a string with broken JSON: " + LOSSY),
    (
        [call(arguments='{"x": 1e999}')],
        "arguments holds a number that is not finite, which JSON cannot say",
    ),
    ([call(arguments={"x": float("nan")})], None),
    ([call(arguments={"x": "\0"})], "arguments holds a NUL character"),
    ([call(arguments={"\ud83d": 1})], None),
    ([call(arguments={"x": b"1"})], "arguments holds bytes, which JSON cannot say"),
    ([call(arguments="[" * 100_000)], "arguments is nested too deeply"),
]


@pytest.mark.parametrize(("calls", "reason"), CALLS, ids=lambda value: str(value)[:40])
def test_a_call_that_cannot_be_used_gives_its_reason(calls: Any, reason: str | None) -> None:
    found = reason_of({"messages": [HI, {"role": "assistant", "content": "", "tool_calls": calls}]})
    assert found == reason or (reason is None and found.startswith("arguments "))


def test_calls_in_both_fields_are_refused() -> None:
    turn = calling(call()) | {"function_call": {"name": "weather", "arguments": "{}"}}
    assert reason_of({"messages": [HI, turn]}) == "a turn has both tool_calls and function_call, expected tool_calls"


TOOLS = [
    ("weather", "tools is a string with broken JSON: Expecting value"),
    ({"name": "f"}, "tools is an object, expected a list of functions"),
    (["f"], "a function in tools is a string with broken JSON: Expecting value"),
    ([3], "tools holds a number, expected {type: function, function: {name, ...}}"),
    ([{"type": "web_search"}], "tools holds something of another type than function"),
    ([{"description": "x"}], "a function in tools has no name"),
    ([{"type": "function", "function": "f"}], "a function in tools has no name"),
    ([{"name": ["f"]}], "the name of a function in tools is a list, expected a string"),
]


@pytest.mark.parametrize(("tools", "reason"), TOOLS, ids=[reason[:50] for _, reason in TOOLS])
def test_tools_that_cannot_be_used_give_their_reason(tools: Any, reason: str) -> None:
    assert reason_of({"messages": [HI, HELLO], "tools": tools}) == reason


ARGUMENTS = {
    "as an object": "{{ c['function']['arguments'] | tojson }}",
    "concatenated": "{{ '' + c['function']['arguments'] }}",
    "written out": "{{ c['function']['arguments'] }}",
    "of either kind": "{% if c['function']['arguments'] is string %}{{ c['function']['arguments'] }}{% else %}"
    "{{ c['function']['arguments'] | tojson }}{% endif %}",
}


def with_calls(arguments: str) -> str:
    """Return a chat template that writes the arguments of calls in this way."""
    return (
        "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['tool_calls'] %}"
        "{% for c in m['tool_calls'] %}{{ '<call>' + c['function']['name'] + ' ' }}" + arguments + "{{ '</call>' }}"
        "{% endfor %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def trained(template: str, values: dict[str, Any]) -> list[str]:
    """Return the trained texts of a row."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    example = RowEncoder(tokenizer, train_on="assistant", date=datetime.date(2024, 2, 29)).encode(read(values))
    return tokenizer.decode(example.input_ids[example.loss_mask]).split("<|im_end|>")[:-1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("as_text", [True, False])
def test_calls_are_written_as_json_whatever_shape_the_template_reads(
    arguments: str, content: str | None, as_text: bool, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"city": "São Paulo", "days": 2, "hourly": True}
    calls = calling(*(call(arguments=json.dumps(it) if as_text else it) for it in (given, {})), content=content)
    values = {"messages": [HI, calls, result("None"), result("hot"), HELLO], "tools": [WEATHER]}
    written = '<call>weather {"city": "São Paulo", "days": 2, "hourly": true}</call><call>weather {}</call>'
    with caplog.at_level("DEBUG", logger="qlora_train"):
        assert trained(with_calls(ARGUMENTS[arguments]), values) == [written, "hello"]
    assert ("arguments of calls as JSON text" in caplog.text) == (arguments in ("concatenated", "written out"))


def test_arguments_that_a_template_can_only_write_as_python_are_refused() -> None:
    values = {"messages": [HI, calling(call(arguments={"city": "Oslo"})), result(), HELLO], "tools": [WEATHER]}
    with pytest.raises(UnusableRowError, match=r"^the chat template does not write the arguments of a call as JSON$"):
        trained(with_calls("{{ c['function']['arguments'] | pprint }}"), values)


def test_calls_are_written_by_a_template_that_asks_for_null() -> None:
    """`apply_chat_template` drops null fields, and the template would write no call."""
    template = with_calls(ARGUMENTS["as an object"])
    turns = [HI, calling(call(arguments={"city": "Oslo"}), content=None), result(), HELLO]
    expected = trained(template, {"messages": turns, "tools": [WEATHER]})
    asking = template.replace("if m['tool_calls']", "if m['content'] is none")
    assert trained(asking, {"messages": turns, "tools": [WEATHER]}) == expected


def test_calls_that_the_template_never_writes_are_refused_as_such() -> None:
    template = with_calls(ARGUMENTS["as an object"]).replace("if m['tool_calls']", "if m['calls']")
    turns = [HI, calling(call(arguments={"city": "Oslo"}), content=None), result(), HELLO]
    with pytest.raises(UnusableRowError, match=r"^the chat template leaves out or rewrites a call"):
        trained(template, {"messages": turns, "tools": [WEATHER]})
