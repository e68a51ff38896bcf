"""Brings a row's messages into the one form that the chat format takes: {role, content}, and tool_calls where tools are called.

Whatever cannot be trained on raises Refused with the cause.
"""

import json
import re
from typing import NamedTuple

from posttrain.data.parts import Refused

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    "system": "system",
}
# which role may follow which; None is the start
MAY_FOLLOW = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """A plain text, of which every token is trained: continued pre-training."""

    text: str


class Chat(NamedTuple):
    """A conversation that ends with an answer. Messages are {role, content}, and tool_calls where an assistant calls tools."""

    messages: list[dict]
    tools: list[dict] | None = None


class Pair(NamedTuple):
    """Two answers to one conversation."""

    prompt: list[dict]  # messages, the last one from the user or a tool
    chosen: str
    rejected: str
    tools: list[dict] | None = None


def messages_of(value, column: str) -> list[dict]:
    """Read [{role, content}, ...] or ShareGPT's [{from, value}, ...], with tool calls in OpenAI's form or as function_call turns."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Refused(f"{column} is not a list of messages")
    return [_message(message) for message in value]


def _message(message: dict) -> dict:
    """Read one message."""
    name, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Refused(f"unknown role {name!r}")
    if message.get("weight", 1) != 1 or message.get("train", True) is not True:
        raise Refused("a message says that it is not to be trained (weight or train), which is not supported")
    if message.get("reasoning_content"):
        raise Refused("a message has reasoning_content, which would be lost: write it into the content")
    if isinstance(content, list):  # OpenAI's parts
        if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise Refused("a message holds something other than text")
        content = "".join(part["text"] for part in content)
    if name == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(content)}
    if calls := message.get("tool_calls"):
        content = "" if content is None else content
        if not isinstance(content, str):
            raise Refused("a message is not text")
        return {"role": role, "content": clean(content, "", empty=True), "tool_calls": _calls(calls)}
    return {"role": role, "content": clean(content, "a message")}


def _calls(value) -> list[dict]:
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


def tools_of(row: dict) -> list[dict] | None:
    """The tools that a row describes, None without any."""
    tools = _parsed(row.get("tools") or None, "tools")
    if tools is None or tools == []:
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


def transcript(text: str) -> list[dict]:
    """Read the messages of a transcript in the form of Anthropic's HH data ("\\n\\nHuman: ...\\n\\nAssistant: ..."); all turns are kept."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not turns:
        raise Refused("chosen and rejected are texts without a prompt")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[turns[i]], "content": clean(turns[i + 1].strip(), "a message")} for i in range(0, len(turns), 2)]


def exchange(row: dict, question: str, context: str | None, answer: str) -> list[dict]:
    """The question and the answer that stand in columns of their own; the context, where there is one, ends the question."""
    content = text_of(row, question)
    if context and row.get(context):
        content += "\n\n" + text_of(row, context)
    return [{"role": "user", "content": content}, {"role": "assistant", "content": text_of(row, answer)}]


def system_message(row: dict) -> list[dict]:
    """The system message in a row's own column, in a list that is empty without one."""
    return [{"role": "system", "content": text_of(row, "system")}] if row.get("system") else []


def check_order(messages: list[dict]) -> None:
    """Raise Refused unless each message's role may follow the one before."""
    before = None
    for message in messages:
        role = message["role"]
        if before not in MAY_FOLLOW[role]:
            raise Refused(f"wrong order of roles: {role} {'after ' + before if before else 'first'}")
        before = role


def text_of(row: dict, column: str) -> str:
    """The text of a column."""
    return clean(row[column], column)


def clean(value, what: str, empty: bool = False) -> str:
    """The text, if it is one that can be trained on."""
    if not isinstance(value, str):
        raise Refused(f"{what} is null" if value is None else f"{what} is a {type(value).__name__}, not text")
    if not empty and not value.strip():
        raise Refused(f"{what} is empty")
    if CONTROL.search(value):
        raise Refused(f"{what} holds control characters")
    if not value.isascii() and SURROGATE.search(value):
        raise Refused(f"{what} holds half a surrogate pair")
    return value
