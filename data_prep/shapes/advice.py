"""What an error about rows of no known shape shows: their columns, an example of each, and the options that would read them."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data_prep.shapes.columns import Columns
from data_prep.shapes.names import LISTS, SPEAKER_KEYS, TEXT_KEYS, near, quoted, words_of
from posttrain.common.errors import shown_name

EXAMPLE = 60  # characters of a value that an error shows
HINTS = {
    "prompt": ("prompt", "question", "instruct", "query", "input", "user", "human", "ask", "task", "problem", "title", "source"),
    "answer": ("answer", "respon", "output", "complet", "reply", "assistant", "target", "solution", "gpt", "model"),
    "chosen": ("chosen", "better", "prefer", "win", "good", "best", "positive", "accept", "_w", "pos"),
    "rejected": ("reject", "worse", "lose", "loss", "bad", "worst", "negative", "disprefer", "_l", "neg"),
}  # parts of names, by what such a column likely holds
ORDINARY = ("role", "from")
# last words of the names of columns that hold no text to be trained
NO_TEXT = {"metadata", "meta", "uuid", "guid", "id", "ids", "url", "timestamp", "time", "date", "at", "created", "updated", "info", "extra"}
NO_TEXT |= {"license", "version", "tags", "hash", "split", "lang", "language"}


class Reading(NamedTuple):
    """Options that may read rows."""

    columns: Columns
    line: str  # as on a command line


def describe(rows: Iterable[dict]) -> str:
    """Return the columns of some rows with a value of each as an example, a line each, for an error."""
    examples: dict[str, object] = {}
    for row in rows:
        for name, value in row.items():
            if examples.get(name) is None:
                examples[name] = value
    width = max((len(shown_name(name)) for name in examples), default=0)
    return "\n".join(f"    {shown_name(name):{width}}  {_short(value)}" for name, value in examples.items())


def _short(value) -> str:
    """Return a value as JSON on one line, cut where it is long."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= EXAMPLE else text[:EXAMPLE] + " ..."


def is_texts(value) -> bool:
    """Whether a value is a list of texts, which may be those of two speakers in turn."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def readings(rows: list[dict], kind: str) -> Iterator[Reading]:
    """Yield options that may read rows of no known shape, by the names of columns and what they hold; the likeliest first."""
    texts: dict[str, None] = {}  # names of columns that hold texts, in their order
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if row.get(name)]
        if not NO_TEXT.isdisjoint(words_of(name)[-1:]):
            continue
        if any(isinstance(value, str) and value.strip() and not re.fullmatch(r"[\w./:-]{0,40}", value) for value in values):
            texts[name] = None
        elif kind == "sft" and values and all(isinstance(value, list) and all(isinstance(one, dict) for one in value) for value in values):
            yield from _messages(name, [message for value in values for message in value])
        elif kind == "sft" and name in LISTS and values and all(isinstance(value, list) and len(value) == 1 for value in values):
            texts[name] = None
    wanted = ("prompt", "answer") if kind == "sft" else ("prompt", "chosen", "rejected")
    common = [name for name in texts if all(name in row for row in rows)]
    guessed = _guess(common, wanted)
    if len(guessed) == len(wanted):
        yield _named(guessed)
    turns = [name for name in rows[0] if all(is_texts(row.get(name)) and len(row[name]) % 2 == 0 for row in rows)]
    if len(turns) == 1 and kind == "sft":
        yield _named({"messages": turns[0]})
    if len(common) == len(wanted) == 2 and not any(hint in common[1].lower() for hint in HINTS["prompt"]) and not near(common[0]):
        yield _named(dict(zip(wanted, common, strict=True)))  # no other way to read them, but the other way around
    if kind == "sft" and len(common) == 1 and not any(hint in common[0].lower() for hint in (*HINTS["prompt"], *HINTS["answer"])):
        yield _named({"text": common[0]})


def _named(names: dict[str, str]) -> Reading:
    return Reading(Columns(names=names), quoted("--columns", ",".join(f"{what}={name}" for what, name in names.items())))


def _messages(name: str, messages: list[dict]) -> Iterator[Reading]:
    """Yield how a column of objects may be read as messages."""
    keys = set.intersection(*(set(message) for message in messages)) if messages else set()
    column = _named({"messages": name})
    yield column
    speaker, said = (next((key for key in known if key in keys), None) for known in (SPEAKER_KEYS, TEXT_KEYS))
    if said and keys & set(ORDINARY):
        yield Reading(Columns(names=column.columns.names, content_key=said), f"{column.line} --content_key {said}")
    if speaker and said:
        columns = Columns(names=column.columns.names, role_key=speaker, content_key=said)
        yield Reading(columns, f"{column.line} --role_key {speaker} --content_key {said}")


def remedy(rows: list[dict], kind: str) -> str:
    """What is to be written otherwise where no option reads it: texts inside objects, as those of translations, and several answers."""
    for name in dict.fromkeys(name for row in rows for name in row):
        values, shown = [row[name] for row in rows if row.get(name)], shown_name(name)
        if values and all(isinstance(value, dict) for value in values) and NO_TEXT.isdisjoint(words_of(name)[-1:]):
            keys = ", ".join(shown_name(key) for key in dict.fromkeys(key for value in values for key in value))
            return f"\n{shown} holds objects ({keys}): write what is asked and answered into columns of their own, as prompt and response"
        if kind == "sft" and name in LISTS and any(is_texts(value) for value in values):
            return f"\n{shown} holds several answers, of which one can be trained: write that one as a text, in a column answer"
    return ""


def _guess(names: list[str], wanted: tuple[str, ...]) -> dict[str, str]:
    """Return which of the names likely holds what, by a part of the name."""
    left, guessed = list(names), {}
    for what in wanted:
        by_name = next((name for hint in HINTS[what] for name in left if hint in name.lower()), None)
        if by_name:
            guessed[what] = by_name
            left.remove(by_name)
    return guessed
