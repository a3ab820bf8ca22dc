"""Functions that an assistant may call, and its calls, in the one shape that chat templates read.

A function is ``{type: function, function: {name, description, parameters}}``; a call is ``{id, type: function,
function: {name, arguments}}`` with the arguments as an object, whatever the row holds: JSON strings, or the inner object
alone. Whether a template prints them is for `template` to see; some want the arguments as JSON text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_train.data.field_values import NOTHING, read_json, read_string
from qlora_train.data.readers import kind_of
from qlora_train.data.types import Message, UnusableRowError

CALL_FIELDS = ("id", "type", "function", "index")
"""Fields of a call; `index` is its place in the list, which the list says already."""
FUNCTION_FIELDS = ("name", "arguments")
OWN_VARIABLES = frozenset((
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
))  # fmt: skip
"""Arguments of `apply_chat_template` that are not the row's to set."""


def with_text_arguments(turns: Sequence[Message]) -> list[Message]:
    """Return turns whose calls have their arguments as JSON text, for chat templates that concatenate them."""
    return [
        {**turn, "tool_calls": [_with_text_arguments(call) for call in turn["tool_calls"]]}
        if "tool_calls" in turn
        else turn
        for turn in turns
    ]


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": as_json(function["arguments"])}}


def refuse_misread_arguments(turns: Sequence[Message], text: str, *, text_arguments: bool) -> None:
    """Raise UnusableRowError if a chat template wrote objects in Python's notation, or JSON text as a JSON string."""
    for arguments in (call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", [])):
        right = as_json(arguments)
        wrong = {as_json(right), repr(right)} if text_arguments else {str(arguments)} - {right}
        if any(form in text for form in wrong):
            raise UnusableRowError("the chat template does not write the arguments of a call as JSON")


def as_json(value: Any) -> str:
    """Return JSON as the `tojson` of chat templates writes it."""
    return json.dumps(value, ensure_ascii=False)


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the column `tools`, a list of functions or a string with its JSON, in the usual shape; () for nothing.

    Raises:
        UnusableRowError: it is something else, or a function has no name.
    """
    tools = read_json(value, "tools") if value not in NOTHING else None
    if tools in NOTHING:
        return ()
    if not isinstance(tools, list):
        raise UnusableRowError(f"tools is {kind_of(tools)}, expected a list of functions")
    return tuple(_read_tool(tool) for tool in tools)


def read_chat_template_kwargs(value: Any) -> dict[str, Any]:
    """Return the column `chat_template_kwargs`, an object or a string with its JSON; {} for nothing.

    Raises:
        UnusableRowError: it is something else, or sets what the program sets.
    """
    kwargs = read_json(value, "chat_template_kwargs") if value not in NOTHING else {}
    if not isinstance(kwargs, dict):
        raise UnusableRowError(f"chat_template_kwargs is {kind_of(kwargs)}, expected an object")
    own = OWN_VARIABLES.intersection(kwargs)
    if own:
        raise UnusableRowError(f"chat_template_kwargs sets {min(own)}, expected variables of the chat template only")
    return kwargs


def _read_tool(tool: Any) -> dict[str, Any]:
    said = read_json(tool, "a function in tools") if isinstance(tool, str) else tool
    if not isinstance(said, dict):
        raise UnusableRowError(f"tools holds {kind_of(said)}, expected {{type: function, function: {{name, ...}}}}")
    if said.get("type") not in (None, "function"):
        raise UnusableRowError("tools holds something of another type than function")
    fields = {name: field for name, field in said.items() if name != "type"}
    if "function" not in fields:
        fields = {"function": fields}
    _read_name(fields["function"], "a function in tools")
    return {"type": "function", **fields}


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Return calls in the usual shape, at least one.

    Args:
        value: a list of calls, one call, or a string with the JSON of either.
        name: of the field, for reasons.

    Raises:
        UnusableRowError: it is something else, a call has no name or fields that would be lost, or its arguments are no
            object.
    """
    is_text = isinstance(value, str)
    calls = read_json(value, name) if is_text else value
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        found = "an empty list" if calls == [] else kind_of(calls)
        raise UnusableRowError(f"{name} is {found}, expected a list of calls")
    return [_read_call(call, name, is_text=is_text) for call in calls]


def _read_call(call: Any, name: str, *, is_text: bool) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise UnusableRowError(f"{name} holds {kind_of(call)}, expected {{name, arguments}}")
    outer = dict(call)
    if outer.get("function") in NOTHING:  # the inner object alone, perhaps with an id beside its fields
        outer["function"] = {field: outer.pop(field, None) for field in FUNCTION_FIELDS}
    if outer.get("type") not in (*NOTHING, "function"):
        raise UnusableRowError(f"{name} holds a call of another type than function")
    function_name = _read_name(outer["function"], f"a call in {name}")
    _refuse_lost(outer, CALL_FIELDS, name)
    _refuse_lost(outer["function"], FUNCTION_FIELDS, name)
    arguments = _read_arguments(outer["function"].get("arguments"), is_text=is_text)
    function = {"name": function_name, "arguments": arguments}
    if outer.get("id") in NOTHING:
        return {"type": "function", "function": function}
    return {"id": read_string(outer["id"], f"the id of a call in {name}"), "type": "function", "function": function}


def _read_name(function: Any, where: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if name in NOTHING:
        raise UnusableRowError(f"{where} has no name")
    return read_string(name, f"the name of {where}")


def _refuse_lost(fields: dict[str, Any], known: tuple[str, ...], name: str) -> None:
    lost = next((field for field in fields if field not in known and fields[field] not in NOTHING), None)
    if lost is not None:
        raise UnusableRowError(
            f"a call in {name} has the field {lost}, which training would lose; expected {{name, arguments}}"
        )


def _read_arguments(value: Any, *, is_text: bool) -> dict[str, Any]:
    """Return the arguments as an object; none at all is a call without arguments.

    `is_text` says that the whole call came as a string, so that a null among its arguments is meant.
    """
    if value in NOTHING:
        return {}
    arguments = value if is_text and isinstance(value, dict) else read_json(value, "arguments")
    if not isinstance(arguments, dict):
        raise UnusableRowError(f"arguments is {kind_of(arguments)}, expected an object")
    return arguments
