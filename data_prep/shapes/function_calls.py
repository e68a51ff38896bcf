"""Brings tools, calls and their results into the form that a template demands, where it refuses the row's own, and tells lost names.

A template may want a description of a tool wrapped as {type: function}, call ids of nine letters or digits, or arguments as JSON text.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator

from data_prep.shapes.messages import Chat, Document, Pair
from posttrain.data.chat import ChatFormat
from posttrain.data.parts import Part, Refused

CALL_ID = re.compile("[a-zA-Z0-9]{9}")
DIGITS = "abcdefghijklmnopqrstuvwxyz0123456789"
WRAPPED = "descriptions of tools wrapped as {type: function}, as the template expects them"
NEW_IDS = "call ids made anew: the template demands nine letters or digits"
UNWRITTEN = "names of messages left out, of the role {role}: the template does not write them"
NAMED = "a tool's result named after its call"
BARE = "<tool_response> taken off results of tools: the template writes it around them"
RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
Item = Document | Chat | Pair


def fitted(chat: ChatFormat, item: Item, parts_of: Callable[[Item], list[list[Part]]]) -> tuple[Item, list[list[Part]]]:
    """Return a row in the first form that the template can write, with notes on what was changed, and its parts.

    Raises Refused with the cause that the row has as it is, where no form can be written.
    """
    messages = _messages(item)
    if isinstance(item, Document) or not (item.tools or any(len(m) > 2 or m["role"] == "tool" for m in messages)):
        return item, parts_of(item)
    if item.tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
        item = _bare_results(item, messages) if "<tool_response>" in getattr(chat.syntax, "tool_jinja", "") else item
        item, parts = _with_tools(item, _messages(item), parts_of)
    else:
        parts = parts_of(item)
    for role in sorted({m["role"] for m in messages if "name" in m} - {"tool"}):
        bare = _with_messages(item, [_nameless(m) if m["role"] == role else m for m in _messages(item)], UNWRITTEN.format(role=role))
        with contextlib.suppress(Refused):  # of a template that demands names
            item = bare if parts_of(bare) == parts else item
    return item, parts


def _bare_results(item: Chat | Pair, messages: list[dict]) -> Chat | Pair:
    """Take <tool_response> off results, as Hermes' data has it, for a template that writes it; several in one are several results."""
    found: list[dict] = []
    for message in messages:
        blocks = [*RESPONSE.finditer(message["content"])] if message["role"] == "tool" else []
        whole = "".join(block[0] for block in blocks) == message["content"]
        found += [{**message, "content": block[1]} for block in blocks] if blocks and whole else [message]
    return item if found == messages else _with_messages(item, found, BARE)


def _nameless(message: dict) -> dict:
    return {key: value for key, value in message.items() if key != "name"}


def _with_tools(item: Chat | Pair, messages: list[dict], parts_of) -> tuple[Item, list[list[Part]]]:
    """Return a row with tools or calls of them as `fitted` does."""
    first = None
    for changed in _forms(item, messages):
        try:
            parts = parts_of(changed)
        except Refused as cause:
            first = first or str(cause)  # not the exception: it would hold this frame, and the frame it
            continue
        named = _with_messages(changed, _named(_messages(changed)))
        if _messages(named) != _messages(changed) and (other := parts_of(named)) != parts:
            return named._replace(notes=(*named.notes, NAMED)), other
        return changed, parts
    raise Refused(first)


def _forms(item: Chat | Pair, messages: list[dict]) -> Iterator[Chat | Pair]:
    """Yield the row as it is, then with every set of changes, those with the fewest first."""
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in item.tools or []]
    fitting = _with_new_ids(messages)
    changes = [
        *([lambda one: one._replace(tools=wrapped, notes=(*one.notes, WRAPPED))] if wrapped != (item.tools or []) else []),
        *([lambda one: _with_messages(one, _named(_messages(one)), NAMED)] if _named(messages) != messages else []),
        *([lambda one: _with_messages(one, _with_new_ids(_messages(one)), NEW_IDS)] if fitting != messages else []),
        *([lambda one: _with_messages(one, _with_text_arguments(_messages(one)))] if any("tool_calls" in m for m in messages) else []),
    ]
    for count in range(len(changes) + 1):
        for chosen in itertools.combinations(changes, count):
            changed = item
            for change in chosen:
                changed = change(changed)
            yield changed


def _messages(item: Item) -> list[dict]:
    return [] if isinstance(item, Document) else item.messages if isinstance(item, Chat) else item.prompt


def _with_messages(item: Chat | Pair, messages: list[dict], *notes: str) -> Chat | Pair:
    notes = (*item.notes, *notes)
    return item._replace(messages=messages, notes=notes) if isinstance(item, Chat) else item._replace(prompt=messages, notes=notes)


def _with_text_arguments(messages: list[dict]) -> list[dict]:
    """The messages with the arguments of every call as JSON text."""
    return [
        message | {"tool_calls": [_text_arguments(call) for call in message["tool_calls"]]} if "tool_calls" in message else message
        for message in messages
    ]


def _text_arguments(call: dict) -> dict:
    function = call["function"]
    if isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _with_new_ids(messages: list[dict]) -> list[dict]:
    """The messages with ids of nine letters or digits at every call and its result; those that fit stay."""
    result: list[dict] = []
    waiting: list[tuple[str | None, str]] = []  # calls without a result so far: the id in the row, and the new one
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            calls = []
            for index, call in enumerate(message["tool_calls"]):
                old = call.get("id")
                new = old if isinstance(old, str) and CALL_ID.fullmatch(old) else _id_of(number, index, old)
                waiting.append((old, new))
                calls.append({**call, "id": new})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and waiting:
            old, new = _answered(waiting, message.get("tool_call_id"))
            waiting.remove((old, new))
            message = {**message, "tool_call_id": new}
        result.append(message)
    return result


def _named(messages: list[dict]) -> list[dict]:
    """The messages with a name at every tool's result that has none: that of the function whose call it answers."""
    result: list[dict] = []
    waiting: list[tuple[str | None, str]] = []
    for message in messages:
        waiting += [(call.get("id"), call["function"]["name"]) for call in message.get("tool_calls") or []]
        if message["role"] == "tool" and waiting:
            answered = _answered(waiting, message.get("tool_call_id"))
            waiting.remove(answered)
            message = {"name": answered[1], **message}
        result.append(message)
    return result


def _answered(waiting: list[tuple[str | None, str]], call_id: str | None) -> tuple[str | None, str]:
    """The call that a result answers: the one with its id, else the first."""
    return next((call for call in waiting if call_id is not None and call[0] == call_id), waiting[0])


def _id_of(number: int, index: int, old) -> str:
    """An id of nine letters or digits for a call, always the same."""
    digest = hashlib.blake2b(f"{number} {index} {old}".encode(), digest_size=9).digest()
    return "".join(DIGITS[byte % len(DIGITS)] for byte in digest)
