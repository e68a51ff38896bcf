"""Reads tool calls and descriptions of tools, as objects or as JSON text, into the form that templates take: OpenAI's.

Whatever cannot be trained on raises Refused with the cause.
"""

import json
import re
from collections.abc import Iterable

from data_prep.shapes.columns import Row
from data_prep.shapes.structures import json_of, python_of, says_nothing
from posttrain.common.errors import shown_name
from posttrain.data.parts import Refused

SURROGATE = re.compile("[\ud800-\udfff]")
NULLS = "nulls taken out of descriptions of tools: no schema has them, a table fills them in"
NULL_ARGUMENTS = "null arguments taken out of tool calls: the function has none of that name, a table fills them in"
OTHER_FORM = "descriptions of tools in the form of another API, brought into OpenAI's"
ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "kwargs")  # names of a call's arguments
# what else a call may say
ABOUT_CALLS = {"name", "type", "id", "index", "description", "cache_control", "extra_content", "thought_signature", "thoughtSignature"}
SCHEMAS = ("parameters", "input_schema", "inputSchema")  # of a tool, which may be JSON text
TYPES = ("OBJECT", "ARRAY", "STRING", "NUMBER", "INTEGER", "BOOLEAN", "NULL")
KEPT_NULLS = "a tool call has null arguments, which are trained as they are"


def calls_of(value, ignore: Iterable[str] = ()) -> list[dict]:
    """Read tool calls, given as [{type: function, function: {name, arguments}, id}] or as {name, arguments}, in JSON text or objects.

    Raises Refused for whatever a call says besides, except under a key of `ignore`.
    """
    calls = [_call(json_of(call), {*ABOUT_CALLS, *ignore}) for call in as_list(_parsed(value, "a tool call"))]
    if not calls:
        raise Refused("a tool call is empty")
    return calls


def _call(call, about: set[str]) -> dict:
    """Read one call; keys of `about` say nothing that would be lost."""
    outer = {key: inner for key, inner in call.items() if key != "function"} if isinstance(call, dict) else {}
    function = json_of(call.get("function")) if isinstance(call, dict) else None
    if isinstance(function, str) or says_nothing(function):  # {function: name, arguments}, or {name, arguments}
        function, outer = outer | ({"name": function} if isinstance(function, str) else {}), {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Refused("a tool call has no name")
    given = [key for key in ARGUMENTS if not says_nothing(function.get(key)) and key not in about]
    name = given[0] if given else next((key for key in ARGUMENTS if function.get(key) is not None), "arguments")
    rest = outer | {key: inner for key, inner in function.items() if key not in (name, "name")}
    if lost := [key for key, inner in rest.items() if key not in about and inner is not False and not says_nothing(inner)]:
        has = f"no arguments, and {lost[0]}" if name not in function else lost[0]
        raise Refused(f"a tool call has {has}, which would be lost: leave it out with --ignore {shown_name(lost[0])}")
    arguments = python_of(function.get(name))
    if not isinstance(arguments, dict):
        arguments = {} if says_nothing(arguments) else _parsed(arguments, "a tool call's arguments")
    if not isinstance(arguments, dict):
        raise Refused(f"a tool call's arguments are a {type(arguments).__name__}, not an object or its JSON text")
    json_text([function["name"], arguments], "a tool call")
    identity = text_of_id(call.get("id"))
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}} | ({"id": identity} if identity else {})


def text_of_id(value) -> str | None:
    """The id of a call as text; None without one."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def tools_of(row: Row, messages: Iterable[dict] = ()) -> list[dict] | None:
    """The tools that a row describes, None without any; nulls that a table has filled into them, and into calls of them, are taken out."""
    name = row.find("tools", full=True)
    given = row.structure(name) if name else None
    given = [] if says_nothing(given) else _parsed(given, "tools")
    if not given and not any("tool_calls" in message for message in messages):
        return None
    if isinstance(given, list):
        given = [_parsed(tool, "tools") for tool in given]
    elif isinstance(given, dict) and {"name", "function", "functionDeclarations"} & given.keys():
        given = [given]
    given = [_with_schema(tool) for tool in given] if isinstance(given, list) else given
    tools = _in_openais_form(given)
    if tools != given:
        row.notes.append(OTHER_FORM)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("tools is not a list of objects")
    json_text(tools, "a description of tools")
    if any(not isinstance(function_of(tool).get("name", ""), str | None) for tool in tools):
        raise Refused("a description of tools has a name that is no text")
    sound = [_without_nulls(tool) for tool in tools]
    if sound != tools:
        row.notes.append(NULLS)
    _take_nulls_out(messages, sound, row)
    return sound or None


def _with_schema(tool):
    """A description of a tool whose parameters, and those of its function, are no JSON text, but what that holds."""
    if not isinstance(tool, dict):
        return tool
    given = {key: tool[key] for key in SCHEMAS if isinstance(tool.get(key), str)}
    read = {key: {} if says_nothing(text) else _parsed(text, f"{key} of a tool") for key, text in given.items()}
    if other := [key for key, schema in read.items() if not isinstance(schema, dict)]:
        raise Refused(f"{other[0]} of a tool is a text that holds no object")
    inner = json_of(tool.get("function"))
    return tool | read | ({"function": _with_schema(inner)} if isinstance(inner, dict) else {})


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
    if not isinstance(spec, dict):
        raise Refused("tools is not a list of objects")
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
        function = function_of(tool)
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


def json_text(value, what: str) -> str:
    """A value as JSON. Raises Refused where it holds something that no JSON has: half a surrogate pair, NaN, a date."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Refused(f"{what} holds what JSON has not: {error}") from None
    if SURROGATE.search(text):
        raise Refused(f"{what} holds half a surrogate pair")
    return text


def function_of(tool: dict) -> dict:
    """What describes the function of a tool in OpenAI's form."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


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
