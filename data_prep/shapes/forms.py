"""The forms in which a column may hold a conversation, brought into one: a list of messages, objects with a role and a content each.

Read are JSON text, also of each message, an object of lists, pairs of texts, exchanges with a key for each side, and texts in turn.
"""

import itertools
import json
import re

from data_prep.shapes.columns import Columns
from data_prep.shapes.structures import json_of, says_nothing
from posttrain.common.errors import shown_name
from posttrain.data.parts import Refused

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "environment", "tool_response", "tool_result", "tool_output"), "tool"),
    **dict.fromkeys(("function_response", "function_result"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TURNS = "data"  # UltraChat's column of texts, the user's and the assistant's in turn
ASKED = ("input", "user", "human", "question", "query", "prompt", "instruction")  # keys of an exchange, and those of its answer
ANSWERED = ("output", "assistant", "gpt", "bot", "chatbot", "ai", "answer", "response", "completion")
INSIDE = ("messages", "conversations", "conversation")  # keys of an object around a conversation
ABOUT = {"id", "source", "model", "language", "lang", "timestamp"}  # and what else it may say
NUMPY = re.compile(r"\}\s+\{")
PART_TYPES = {"text", "input_text", "output_text", "thinking", "tool_use", "tool_result", "image", "image_url", "input_image"}


def role_of(name, columns: Columns) -> str | None:
    """The role that a message's own name for it means; None for an unknown one."""
    if not isinstance(name, str):
        return None
    known = columns.roles.get(name.lower()) or columns.roles.get(name.strip().lower())
    return known or ROLES.get(re.sub(r"[\s-]+", "_", name.strip().lower()))


def listed(value, column: str, columns: Columns) -> list[dict]:
    """The messages that a column holds in any of the forms. Raises Refused for anything else."""
    value = json_of(_inner_text(json_of(value)))
    if isinstance(value, str):
        how = "as numpy prints objects, without commas between them" if NUMPY.search(value) else "that is neither JSON nor Python's"
        raise Refused(f"{column} is not a list of messages, but a text {how}: write it as JSON")
    if isinstance(value, dict):
        value = _of_object(value, column, columns)
    if not isinstance(value, list) or not value:
        raise Refused(f"{column} is not a list of messages")
    if all(isinstance(one, str) and one.lstrip().startswith("{") for one in value):
        value = [json_of(one) for one in value]
    if all(isinstance(one, list) and len(one) == 2 and all(isinstance(text, str) for text in one) for one in value):
        if not all(role_of(first, columns) for first, _ in value):
            return _in_turns([text for pair in value for text in pair])
        return [{"role": role, "content": content} for role, content in value]
    if all(isinstance(one, str) for one in value):
        if column != TURNS and not (column == "messages" and column in columns.names):
            how = f"--columns messages={column} reads the user's and the assistant's in turn"
            raise Refused(f"{column} is not a list of messages, but of texts: {how}")
        return _in_turns(value)
    if not all(isinstance(one, dict) for one in value):
        raise Refused(f"{column} is not a list of messages")
    if sides := _exchanges(value):
        return [message for one, (asked, answered) in zip(value, sides, strict=True) for message in _exchange(one, asked, answered)]
    if all(len(one) == 1 and role_of(next(iter(one)), columns) for one in value):
        return [{"role": role, "content": content} for one in value for role, content in one.items()]
    return value


def _inner_text(value):
    """What JSON text in JSON text holds; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith('"'):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _of_object(value: dict, column: str, columns: Columns) -> list:
    """The messages of an object: of lists, as tables have them, one around a conversation, or one message. Raises Refused."""
    role = columns.role_key or ("role" if "role" in value else "from")
    content = columns.content_key or ("content" if "content" in value else "value")
    inside = next((key for key in INSIDE if isinstance(value.get(key), list)), None)
    if isinstance(value.get(role), list) and isinstance(value.get(content), list):
        count = len(value[role])
        columns_of = {key: inner for key, inner in value.items() if isinstance(inner, list) and len(inner) == count}
        rest, found = value.keys() - columns_of, [dict(zip(columns_of, row, strict=True)) for row in zip(*columns_of.values(), strict=True)]
        if content not in columns_of:
            raise Refused(f"{column} holds {count} of {role}, and {len(value[content])} of {content}")
    elif inside:
        rest, found = value.keys() - {inside} - ABOUT, value[inside]
    elif role in value and content in value:
        return [value]
    else:
        raise Refused(f"{column} is not a list of messages, but an object with {', '.join(map(shown_name, value)) or 'nothing'}")
    if lost := [key for key in value if key in rest and key not in columns.ignore and not says_nothing(value[key])]:
        raise Refused(f"{column} has {shown_name(lost[0])} beside its messages, which would be lost: leave it out with --ignore {lost[0]}")
    return found


def _in_turns(texts: list[str]) -> list[dict]:
    """The messages of a list of texts, the user's and the assistant's in turn."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]


def _exchanges(value: list[dict]) -> list[tuple[str, str]]:
    """The keys of each exchange for what is asked and answered; empty where one of them is no exchange."""
    found = []
    for one in value:
        asked, answered = ([key for key in keys if not says_nothing(one.get(key))] for keys in (ASKED, ANSWERED))
        if len(asked) != 1 or len(answered) != 1 or not {"role", "from"}.isdisjoint(one):
            if {"input", "output"} <= one.keys() and "role" not in one:  # of which one may be empty, which is refused by its name
                asked, answered = ["input"], ["output"]
            else:
                return []
        found.append((asked[0], answered[0]))
    return found


def _exchange(one: dict, asked: str, answered: str) -> list[dict]:
    """The messages of an exchange {input, output}, as Capybara and XTuner have them, with what else it says about the answer."""
    more = {key: value for key, value in one.items() if key not in (asked, answered, "system", "output_with_loss")}
    answer = {"role": "assistant", "content": one[answered], **more, "loss": one.get("output_with_loss")}
    system = [{"role": "system", "content": one["system"]}] if one.get("system") else []
    return [*system, {"role": "user", "content": one[asked]}, answer]


def parts_of(content):
    """The parts that a message's content holds as JSON text; any other content as it is."""
    if not isinstance(content, str) or not re.match(r'\s*\[\s*\{\s*"', content):
        return content
    found = json_of(content)
    is_parts = isinstance(found, list) and all(isinstance(one, dict) and one.get("type") in PART_TYPES for one in found)
    return found if is_parts and all(not says_nothing(one.get("text", one)) for one in found) else content


def message_in(value):
    """The message that an object is, also as JSON text, in a list; None for any other value."""
    if isinstance(value, str) and not re.match(r'\s*\{\s*"(role|from|content|value)"', value):
        return None
    found = json_of(value)
    is_message = isinstance(found, dict) and bool({"role", "from"} & found.keys()) and bool({"content", "value", "parts"} & found.keys())
    return [found] if is_message and isinstance(found.get("role", found.get("from")), str) else None
