"""Reads the two forms that large data sets of function calls have: glaive-function-calling's texts, and xlam's columns."""

import json
import re

from data_prep.shapes.calls import calls_of
from data_prep.shapes.columns import Row
from data_prep.shapes.messages import clean
from posttrain.data.parts import Refused

ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
TURN = re.compile(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):[ \t]*")
CALL, END = "<functioncall>", "<|endoftext|>"
QUOTED = re.compile(r"""("arguments"\s*:\s*)'(.*)'(\s*\}\s*)\Z""", re.DOTALL)  # arguments as JSON text in single quotes
PREFACE = re.compile(r"\s+with access to the following functions\.\s*Use them if required\s*-?\s*")


def is_xlam(row: Row) -> bool:
    """Whether a row has a question, and calls that answer it, in columns of their own: query, answers, tools."""
    return "query" in row and "answers" in row and "tools" in row


def xlam(row: Row) -> list[dict]:
    """Read a question and the calls that answer it. Raises Refused."""
    question = {"role": "user", "content": clean(row.take("query"), "query")}
    return [question, {"role": "assistant", "content": "", "tool_calls": calls_of(row.structure("answers"))}]


def is_glaive(row: Row) -> bool:
    """Whether a row has a conversation as a text of turns, USER: ... ASSISTANT: ..., in a column chat."""
    chat = row.values.get("chat")
    return isinstance(chat, str) and bool(TURN.match(chat))


def glaive(row: Row) -> tuple[list[dict], list[dict] | None]:
    """Read a text of turns, with calls after <functioncall>, and a system text that describes the tools; returns the tools, too."""
    before, *turns = TURN.split(clean(row.take("chat"), "chat"))
    if before.strip():
        raise Refused("chat has text before its first turn")
    system, tools = ("", None)
    if "system" in row:
        system, tools = _system(clean(row.take("system"), "system"))
    messages = [{"role": "system", "content": system}] if system else []
    for name, text in zip(turns[0::2], turns[1::2], strict=True):
        messages.append(_turn(ROLES[name], text.strip()))
    return messages, tools


def _turn(role: str, text: str) -> dict:
    """Read one turn."""
    if role != "assistant":
        return {"role": role, "content": clean(text, "a message", empty=role == "tool")}
    text, *calls = text.removesuffix(END).rstrip().split(CALL)
    if not calls:
        return {"role": role, "content": clean(text, "a message")}
    return {
        "role": role,
        "content": clean(text.strip(), "a message", empty=True),
        "tool_calls": [one for call in calls for one in _call(call)],
    }


def _call(text: str) -> list[dict]:
    """Read a call such as {"name": "f", "arguments": '{"x": 1}'}."""
    text = text.replace(END, "").strip()
    if quoted := QUOTED.search(text):
        arguments = quoted.group(2).replace("\\'", "'")
        text = text[: quoted.start()] + quoted.group(1) + json.dumps(arguments) + quoted.group(3)
    return calls_of(text)


def _system(text: str) -> tuple[str, list[dict] | None]:
    """The system text without the functions that it describes, one JSON object after another at its end, and those."""
    text = text.strip().removeprefix("SYSTEM:").strip()
    start, tools = re.search(r"^\{", text, re.MULTILINE), []
    if not start:
        return text, None
    decoder, at = json.JSONDecoder(), start.start()
    try:
        while at < len(text):
            tool, end = decoder.raw_decode(text, at)
            tools.append(tool)
            at = end + len(text[end:]) - len(text[end:].lstrip(" \t\r\n,"))
    except ValueError:
        raise Refused("the functions that system describes are not valid JSON") from None
    return PREFACE.sub(".", text[: start.start()].rstrip() + " ").strip(), tools
