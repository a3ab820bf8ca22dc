"""Tools and tool calls of a row in the one shape that chat templates read.

A tool is ``{type: function, function: {name, description, parameters}}``; a call is ``{id, type: function, function:
{name, arguments}}`` with the arguments as an object. Rows may also hold JSON strings, or the inner object alone.

The readers raise `UnusableRowError` with a reason that does not quote the row.
"""

from typing import Any

from qlora_train.data.field_values import EMPTY, read_json, read_string
from qlora_train.data.readers import json_type
from qlora_train.data.types import UnusableRowError

CALL_FIELDS = ("id", "type", "function", "index")
"""Fields of a call; `index` is its position in the list."""
FUNCTION_FIELDS = ("name", "arguments")
OWN_VARIABLES = frozenset((
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
))  # fmt: skip
"""Arguments of `apply_chat_template` that a row may not set."""


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Read the column `tools`: a list of functions, or a string with its JSON."""
    tools = read_json(value, "tools") if value not in EMPTY else None
    if tools in EMPTY:
        return ()
    if not isinstance(tools, list):
        raise UnusableRowError(f"tools is {json_type(tools)}, expected a list of functions")
    return tuple(_read_tool(tool) for tool in tools)


def _read_tool(value: Any) -> dict[str, Any]:
    tool = read_json(value, "a function in tools") if isinstance(value, str) else value
    if not isinstance(tool, dict):
        raise UnusableRowError(f"tools holds {json_type(tool)}, expected {{type: function, function: {{name, ...}}}}")
    if tool.get("type") not in (None, "function"):
        raise UnusableRowError("tools holds something of another type than function")
    fields = {name: field for name, field in tool.items() if name != "type"}
    if "function" not in fields:
        fields = {"function": fields}
    _read_name(fields["function"], "a function in tools")
    return {"type": "function", **fields}


def read_chat_template_kwargs(value: Any) -> dict[str, Any]:
    """Read the column `chat_template_kwargs`: an object, or a string with its JSON."""
    kwargs = read_json(value, "chat_template_kwargs") if value not in EMPTY else {}
    if not isinstance(kwargs, dict):
        raise UnusableRowError(f"chat_template_kwargs is {json_type(kwargs)}, expected an object")
    own = OWN_VARIABLES.intersection(kwargs)
    if own:
        raise UnusableRowError(f"chat_template_kwargs sets {min(own)}, expected variables of the chat template only")
    return kwargs


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Read the field `name` of a turn: a list of calls, one call, or a string with the JSON of either."""
    is_text = isinstance(value, str)
    calls = read_json(value, name) if is_text else value
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        found = "an empty list" if calls == [] else json_type(calls)
        raise UnusableRowError(f"{name} is {found}, expected a list of calls")
    return [_read_call(call, name, is_text=is_text) for call in calls]


def _read_call(value: Any, name: str, *, is_text: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnusableRowError(f"{name} holds {json_type(value)}, expected {{name, arguments}}")
    call = dict(value)
    if call.get("function") in EMPTY:  # the inner object alone, perhaps with an id beside its fields
        call["function"] = {field: call.pop(field, None) for field in FUNCTION_FIELDS}
    if call.get("type") not in (*EMPTY, "function"):
        raise UnusableRowError(f"{name} holds a call of another type than function")
    function_name = _read_name(call["function"], f"a call in {name}")
    for fields, known in ((call, CALL_FIELDS), (call["function"], FUNCTION_FIELDS)):
        lost = next((field for field in fields if field not in known and fields[field] not in EMPTY), None)
        if lost is not None:
            raise UnusableRowError(
                f"a call in {name} has the field {lost}, which training would lose; expected {{name, arguments}}"
            )
    arguments = _read_arguments(call["function"].get("arguments"), is_text=is_text)
    read = {"type": "function", "function": {"name": function_name, "arguments": arguments}}
    if call.get("id") in EMPTY:
        return read
    return {"id": read_string(call["id"], f"the id of a call in {name}"), **read}


def _read_name(function: Any, where: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if name in EMPTY:
        raise UnusableRowError(f"{where} has no name")
    return read_string(name, f"the name of {where}")


def _read_arguments(value: Any, *, is_text: bool) -> dict[str, Any]:
    """Return the arguments as an object; `is_text`: the whole call came as JSON, so a null in it is meant."""
    if value in EMPTY:
        return {}
    arguments = value if is_text and isinstance(value, dict) else read_json(value, "arguments")
    if not isinstance(arguments, dict):
        raise UnusableRowError(f"arguments is {json_type(arguments)}, expected an object")
    return arguments
