"""Reads what may stand beside a row's messages in columns of its own: a system message, earlier exchanges, arguments for the template."""

from data_prep.shapes.columns import Columns, Row
from data_prep.shapes.content_parts import text_of
from data_prep.shapes.messages import clean, messages_of
from posttrain.data.parts import Refused

EXCHANGES = (("question", "answer"), ("query", "response"), ("prompt", "response"), ("instruction", "output"))  # keys of an object


def with_system(row: Row, messages: list[dict]) -> list[dict]:
    """Return the messages after the system message of the row's own column, unless they begin with one, which then holds."""
    name = row.find("system", full=True)
    if name is None:
        return messages
    content = clean(text_of(row.take(name)), name)
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != content:
            row.notes.append(f"a system message in the messages taken, not the one in the column {row.shown[name]}")
        return messages
    return [{"role": "system", "content": content}, *messages]


def history(row: Row, columns: Columns) -> list[dict]:
    """Read earlier exchanges, [[question, answer], ...] as LLaMA-Factory, ms-swift and ChatGLM have them, or messages."""
    name = row.find("history", full=True)
    if name is None:
        return []
    exchanges = row.structure(name)
    if not isinstance(exchanges, list):
        raise Refused(f"{name} is not a list of [question, answer]")
    if all(isinstance(one, dict) for one in exchanges):
        keys = next((keys for keys in EXCHANGES if all(set(keys) <= one.keys() for one in exchanges)), None)
        if keys is None:
            return messages_of(exchanges, name, columns)
        exchanges = [[one[key] for key in keys] for one in exchanges]
    if not all(isinstance(one, list) and len(one) == 2 for one in exchanges):
        raise Refused(f"{name} is not a list of [question, answer]")
    roles = ("user", "assistant")
    return [{"role": role, "content": clean(text, name)} for one in exchanges for role, text in zip(roles, one, strict=True)]


def options_of(row: Row) -> dict | None:
    """Return the row's arguments for the template, None without any."""
    if "chat_template_kwargs" not in row:
        return None
    options = row.structure("chat_template_kwargs")
    if not isinstance(options, dict):
        raise Refused("chat_template_kwargs is not an object")
    return {name: value for name, value in options.items() if value not in (None, [], {}, "")} or None
