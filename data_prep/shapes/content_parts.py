"""Reads messages whose content is a list of parts, as the APIs of OpenAI, Anthropic, Bedrock and Gemini have it, as messages of text.

Calls, their results and thinking, which stand among the texts there, become tool_calls, messages of the role tool, and thinking.
"""

import json

from posttrain.data.parts import Refused

TEXTS = ("text", "input_text", "output_text")
THOUGHTS = ("thinking", "reasoningContent")
CALLS = ("tool_use", "toolUse", "functionCall", "function_call")
RESULTS = ("tool_result", "toolResult", "functionResponse", "function_response")
EMPTY = ("", [], {})
# keys of a part that say nothing about its text
ABOUT = {
    "cache_control",
    "citations",
    "annotations",
    "logprobs",
    "signature",
    "thoughtSignature",
    "thought_signature",
    "is_error",
    "status",
}


def in_messages(message: dict, parts: list, role_key: str, content_key: str) -> list[dict]:
    """Return the messages that one with parts says: itself with a text, and one for each result of a tool, in their order.

    `message` is without its parts, which a template would write in the order thinking, text, calls. Raises Refused for another order, and
    for parts that are no text.
    """
    messages: list[dict] = []
    own, calls = None, []
    for part in parts:
        kind, value = _read(part)
        if kind == "result":
            messages.append({role_key: "tool", **value, content_key: value["content"]})
            own = None
            continue
        if own is None:
            own, calls = {**message, content_key: ""}, []
            messages.append(own)
        if kind == "call":
            calls.append(value)
            own["tool_calls"] = calls
        elif calls or (kind == "thinking" and own[content_key].strip()):
            raise Refused(f"a message has {kind} after its {'tool calls' if calls else 'text'}, where no template writes it")
        elif kind == "thinking":
            own["thinking"] = f"{own['thinking']}\n\n{value}" if own.get("thinking") else value
        else:
            own[content_key] += value
    return messages or [{**message, content_key: ""}]


def text_of(content):
    """Return the text of parts that are all texts, also of Gemini's {parts: [...]}; any other content as it is."""
    parts = content["parts"] if isinstance(content, dict) and content.keys() <= {"parts", "role"} and "parts" in content else content
    is_text = isinstance(parts, list) and all(isinstance(part, dict) and _text(_said(part)) is not None for part in parts)
    return "".join(part["text"] for part in parts) if is_text else content


def _said(part: dict) -> dict:
    """What a part says, without nulls, as a table has them for the keys of other parts."""
    return {key: value for key, value in part.items() if value is not None and key not in ABOUT and (key == "text" or value not in EMPTY)}


def _text(part: dict) -> str | None:
    """The text of a part that is nothing else, else None."""
    text = part.get("text")
    return text if part.keys() <= {"type", "text"} and part.get("type", "text") in TEXTS and isinstance(text, str) else None


def _read(part) -> tuple[str, str | dict]:
    """Return (text, thinking, call or result; what it says). Raises Refused for any other part."""
    if not isinstance(part, dict):
        raise Refused("a message holds something other than text")
    part = _said(part)
    is_thought = part.pop("thought", False) is True  # Gemini's
    if (text := _text(part)) is not None:
        return "thinking" if is_thought else "text", text
    kind = part.get("type", "text")
    if not isinstance(kind, str):
        raise Refused("a message holds a part whose type is no text")
    kind = next((key for key in part if key not in ("type", "text")), "nothing") if kind in TEXTS else kind
    inner = part[kind] if isinstance(part.get(kind), dict) else part  # a part of Bedrock's or Gemini's is {kind: {...}}
    if kind in THOUGHTS:
        thinking = inner.get("thinking", inner.get("reasoningText"))
        thinking = thinking.get("text") if isinstance(thinking, dict) else text_of(thinking)
        if isinstance(thinking, str):
            return "thinking", thinking
    if kind in CALLS:
        arguments = _first(inner, "input", "args", "arguments")
        return "call", {"id": _first(inner, "id", "toolUseId"), "function": {"name": inner.get("name"), "arguments": arguments}}
    if kind in RESULTS:
        about = {"name": inner.get("name"), "tool_call_id": _first(inner, "tool_use_id", "toolUseId", "id")}
        return "result", about | {"content": _result(_first(inner, "content", "response"))}
    raise Refused(f"a message holds {kind}, which is something other than text")


def _first(part: dict, *keys: str):
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _result(content):
    """What a tool answered, its texts and Bedrock's {json: ...} as one text; any other value as it is. Raises Refused for pictures."""
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        return content
    read = [("text", json.dumps(one["json"], ensure_ascii=False)) if one.get("json") is not None else _read(one) for one in content]
    if other := [kind for kind, _ in read if kind != "text"]:
        raise Refused(f"a tool's result holds a {other[0]}, which is something other than text")
    return "".join(text for _, text in read)
