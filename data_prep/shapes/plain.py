"""Reads the rows that most files consist of, messages of plain texts in turn, in a fraction of the time; it leaves all others alone.

What it reads it reads as conversations.sft_of does, which is tested row by row.
"""

import functools

from data_prep.shapes.columns import IGNORED, is_empty
from data_prep.shapes.forms import ROLES, parts_of
from data_prep.shapes.messages import Chat, clean
from data_prep.shapes.names import MISSED, NAMES, VERDICTS, near
from data_prep.shapes.verdicts import may_say
from posttrain.common.errors import shown_name
from posttrain.data.parts import Refused

SPEAKERS = {name: ROLES[name] for name in ("user", "human", "assistant", "gpt", "system")}
JSON = ("[", " ", "\n", "\t")  # how a text begins that may hold JSON
KNOWN = {*MISSED, *VERDICTS, "contents", "split"}


@functools.lru_cache(64)
def _columns(names: tuple[str, ...]) -> tuple[str, dict[str, str]] | None:
    """The column of messages among others that carry no content, and the note about each of those; None for any other columns."""
    messages = [name for name in names if name in NAMES["messages"]]
    others = [name for name in names if name not in messages]
    alike = len({name.lower() for name in names}) < len(names)
    if alike or len(messages) != 1 or any(name.lower() in KNOWN or near(name) or may_say(name) for name in others):
        return None
    return messages[0], {name: IGNORED + shown_name(name) for name in others}


def plain_chat(row: dict) -> Chat | None:
    """The conversation of a row that has nothing but messages with a role and a text, in turn; None for any other row."""
    if (columns := _columns(tuple(row))) is None:
        return None
    name, notes = columns
    given, messages, before = row[name], [], None
    if type(given) is not list:
        return None
    for message in given:
        if type(message) is not dict or len(message) != 2:
            return None
        speaker, content = (
            (message.get("role"), message.get("content")) if "role" in message else (message.get("from"), message.get("value"))
        )
        role = SPEAKERS.get(speaker) if type(speaker) is str else None
        if role is None or role == before or (role == "system" and before) or (role == "assistant" and before != "user"):
            return None
        if type(content) is not str or not _is_plain(content) or (content[:1] in JSON and parts_of(content) is not content):
            return None
        messages.append({"role": role, "content": content})
        before = role
    if before != "assistant":
        return None
    if not notes:
        return Chat(messages)
    return Chat(messages, notes=tuple(note for other, note in notes.items() if not is_empty(row[other])))


def _is_plain(text: str) -> bool:
    """Whether a text is one that `clean` takes, which is seen of most at once."""
    if text.isascii() and text.isprintable():
        return not (text.isspace() or not text)
    try:
        clean(text, "a message")
    except Refused:
        return False
    return True
