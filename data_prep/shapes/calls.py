"""Reads tool calls and descriptions of tools, as objects or as JSON text, into the form that templates take: OpenAI's.

Whatever cannot be trained on raises Refused with the cause.
"""

import json
import re
from collections.abc import Iterable

from data_prep.shapes.columns import Row
from data_prep.shapes.structures import python_of
from posttrain.data.parts import Refused

SURROGATE = re.compile("[\ud800-\udfff]")
NULLS = "nulls taken out of descriptions of tools: no schema has them, a table fills them in"
NULL_ARGUMENTS = "null arguments taken out of tool calls: the function has none of that name, a table fills them in"
OTHER_FORM = "descriptions of tools in the form of another API, brought into OpenAI's"
ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "kwargs")  # names of a call's arguments
ABOUT_CALLS = {"name", "type", "id", "index", "description"}  # what else a call may say
TYPES = ("OBJECT", "ARRAY", "STRING", "NUMBER", "INTEGER", "BOOLEAN", "NULL")
KEPT_NULLS = "a tool call has null arguments, which are trained as they are"


def calls_of(value) -> list[dict]:
    """Read tool calls, given as [{type: function, function: {name, arguments}, id}] or as {name, arguments}, in JSON text or objects."""
    value = _parsed(value, "a tool call")
    calls = []
    for call in as_list(value):
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if isinstance(function, str) and isinstance(call, dict):  # {function: name, arguments}
            function = {"name": function, "arguments": call.get("arguments")}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Refused("a tool call has no name")
        name = next((key for key in ARGUMENTS if function.get(key) is not None), "arguments")
        if name not in function and (lost := [key for key in function if key not in ABOUT_CALLS and function[key]]):
            raise Refused(f"a tool call has no arguments, and {lost[0]}, which would be lost")
        given = python_of(function.get(name))
        arguments = _parsed(given, "a tool call's arguments") if given not in ("", None) else {}
        _refuse_halves([function["name"], arguments], "a tool call")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}, **known})
    if not calls:
        raise Refused("a tool call is empty")
    return calls


def tools_of(row: Row, messages: Iterable[dict] = ()) -> list[dict] | None:
    """The tools that a row describes, None without any; nulls that a table has filled into them, and into calls of them, are taken out."""
    name = row.find("tools", full=True)
    given = (_parsed(row.structure(name), name) if name else None) or []
    if not given and not any("tool_calls" in message for message in messages):
        return None
    if isinstance(given, list):
        given = [_parsed(tool, "tools") for tool in given]
    elif isinstance(given, dict) and {"name", "function", "functionDeclarations"} & given.keys():
        given = [given]
    tools = _in_openais_form(given)
    if tools != given:
        row.notes.append(OTHER_FORM)
    if tools and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise Refused("tools is not a list of objects")
    _refuse_halves(tools, "a description of tools")
    sound = [_without_nulls(tool) for tool in tools]
    if sound != tools:
        row.notes.append(NULLS)
    _take_nulls_out(messages, sound, row)
    return sound or None


def _in_openais_form(tools):
    """Descriptions of tools in Anthropic's, Bedrock's or Gemini's form, in OpenAI's; any other value as it is."""
    if isinstance(tools, dict) and isinstance(tools.get("tools"), list):  # Bedrock's toolConfig
        tools = tools["tools"]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return tools
    return [function for tool in tools for function in _functions(tool)]


def _functions(tool: dict) -> list[dict]:
    """The functions that one of a row's tools describes, in OpenAI's form where it is one of the others."""
    if declared := tool.get("functionDeclarations") or tool.get("function_declarations"):
        return [{"type": "function", "function": _in_small_letters(function)} for function in as_list(declared)]
    spec = tool.get("toolSpec") or tool
    schema = spec.get("input_schema") or spec.get("inputSchema")
    if not isinstance(schema, dict):
        return [tool]
    about = {key: spec[key] for key in ("name", "description") if spec.get(key) is not None}
    return [{"type": "function", "function": about | {"parameters": schema.get("json") or schema}}]


def _in_small_letters(value):
    """A description of a function with the types of JSON schema, which Gemini's API writes in capitals."""
    if isinstance(value, list):
        return [_in_small_letters(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {key: inner.lower() if key == "type" and inner in TYPES else _in_small_letters(inner) for key, inner in value.items()}


def _without_nulls(value, key: str | None = None):
    """A description of a tool without keys whose value is null, which it may have as a default or constant only."""
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    types = value.get("type")
    nullable = value.get("nullable") is True or "null" in (types if isinstance(types, list) else [types])
    return {
        name: _without_nulls(inner)
        for name, inner in value.items()
        if inner is not None or (key is None and name == "const") or (name == "default" and nullable)
    }


def _take_nulls_out(messages: Iterable[dict], tools: list[dict], row: Row) -> None:
    """Take out null arguments that the called function does not have, as a table fills them in; say of others that they are there."""
    known = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        parameters = function.get("parameters")
        properties = parameters.get("properties", parameters) if isinstance(parameters, dict) else None
        if isinstance(properties, dict):
            known[function.get("name")] = properties
    notes = set()
    for call in (call for message in messages for call in message.get("tool_calls") or []):
        function = call["function"]
        if not isinstance(function["arguments"], dict) or None not in function["arguments"].values():
            continue
        names = known.get(function["name"])
        kept = {key: value for key, value in function["arguments"].items() if value is not None or names is None or key in names}
        notes.add(NULL_ARGUMENTS if kept != function["arguments"] else KEPT_NULLS)
        function["arguments"] = kept
    row.notes += sorted(notes)


def _refuse_halves(value, what: str) -> None:
    """Raise Refused where a text in a value holds half a surrogate pair, which no text file can."""
    if SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str)):
        raise Refused(f"{what} holds half a surrogate pair")


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
