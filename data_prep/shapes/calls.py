"""Reads tool calls and descriptions of tools, as objects or as JSON text, into the form that templates take: OpenAI's.

Whatever cannot be trained on raises Refused with the cause.
"""

import json

from data_prep.shapes.columns import Row
from posttrain.data.parts import Refused


def calls_of(value) -> list[dict]:
    """Read tool calls, given as [{type: function, function: {name, arguments}}] or as {name, arguments}, in JSON text or objects."""
    value = _parsed(value, "a tool call")
    calls = []
    for call in as_list(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise Refused("a tool call has no name or no arguments")
        arguments = _parsed(function["arguments"], "a tool call's arguments")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not calls:
        raise Refused("a tool call is empty")
    return calls


def tools_of(row: Row) -> list[dict] | None:
    """The tools that a row describes, None without any."""
    name = row.find("tools", full=True)
    if name is None:
        return None
    tools = _parsed(row.take(name), name)
    if tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("tools is not a list of objects")
    return tools


def _parsed(value, what: str):
    """The value, read as JSON if it is a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Refused(f"{what}: not valid JSON") from None


def as_list(value) -> list:
    """The value, in a list unless it is one."""
    return value if isinstance(value, list) else [value]
