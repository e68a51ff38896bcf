"""The columns of a row: under which names people have what, which of them a reader has looked at, and what would be lost.

A reader takes columns by `Row.take`, and what none has taken at the end is not trained on: a column that by its name carries content
refuses the row, any other is told as not used. A null column, or an empty one where it may be left out, is no column.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from data_prep.shapes.structures import PYTHON, json_of, python_of
from posttrain.common.errors import nearest, shown_name
from posttrain.data.parts import Refused

# What a column holds, and the names that public datasets and trainers give it, in the order in which they are looked for. A name may
# stand in several lines: what it holds is then decided by the columns beside it.
NAMES = {
    "prompt": ("instruction", "prompt", "question", "query", "inputs", "problem", "input"),
    "context": ("input", "context"),
    # a short answer may stand beside its solution
    "answer": ("output", "response", "completion", "solution", "answer", "targets"),
    "system": ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction"),
    "history": ("history",),
    "messages": ("messages", "conversations", "conversation"),
    "thinking": ("reasoning_content", "reasoning", "thinking", "complex_cot", "chain_of_thought"),
    "chosen": ("chosen", "preferred_output"),
    "rejected": ("rejected", "non_preferred_output"),
    "tools": ("tools", "functions", "toolconfig"),
    "text": ("text",),
}
# columns whose content would be missed, where no reader has taken them: all of the above, and these
MEDIA = ("image", "images", "audio", "audios", "video", "videos", "objects", "img", "image_path", "image_paths", "image_url", "image_urls")
MEDIA += ("pixel_values", "audio_path", "video_path")
LABELS = ("label", "labels", "kto_tag", "is_desirable", "desirable", "is_correct", "is_good", "accepted", "thumbs_up")
MASKS = ("weights", "loss_masks", "train_mask", "assistant_mask", "assistant_masks", "assistant_only_mask", "loss", "train", "mask_history")
PASSAGES = ("passage", "passages", "document", "documents", "article", "background", "knowledge")
MISSED = {
    *MEDIA,
    *LABELS,
    *MASKS,
    *PASSAGES,
    "weight",
    "loss_mask",
    "chat_template_kwargs",
    "completions",
    "answers",
    "options",
    "choices",
    "summary",
}
MISSED |= {name for names in NAMES.values() for name in names}
MISSED_OF_PAIRS = MISSED - {*NAMES["answer"], "text"}  # a third answer is of no use there, and so only told
IGNORED = "column not used: "  # the start of a note about a column that carries no content, as far as its name says
EXAMPLE = 60  # characters of a value that an error shows


class UnknownShape(Refused):
    """A row whose columns are of no known shape."""


@dataclass(frozen=True)
class Columns:
    """How the user's columns and messages are called, where it is not as usual: --columns and its like, or FILE.columns.yaml."""

    names: dict[str, str] = field(default_factory=dict)  # what a column holds, a key of NAMES: its name
    roles: dict[str, str] = field(default_factory=dict)  # a role of the rows: user, assistant, system or tool
    role_key: str | None = None  # of a message
    content_key: str | None = None
    ignore: tuple[str, ...] = ()  # columns that are not to be trained on
    keep: tuple[str, str] | None = None  # a column and the value, as text, that a row must have there
    train_on: str = "all"  # all, last, or the roles or names of assistants, separated by commas

    @classmethod
    def read(cls, path: Path, over: "Columns") -> "Columns":
        """Read a file FILE.columns.yaml; what the command line says goes over it. Raises ValueError."""
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
        known = ("columns", "roles", "role_key", "content_key", "ignore")
        if not isinstance(given, dict) or not given.keys() <= set(known):
            seen = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
            raise ValueError(f"{path} should hold keys among {', '.join(known)}; saw {seen}")
        texts = {"columns": given.get("columns") or {}, "roles": given.get("roles") or {}}
        for name, value in texts.items():
            if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
                raise ValueError(f"{path}: {name} should map names to names, as in {{prompt: question}}; saw {value!r}")
        if not all(isinstance(name, str) for name in _list_of(given.get("ignore"))):
            raise ValueError(f"{path}: ignore should be a list of names of columns, as in [notes, id]; saw {given['ignore']!r}")
        keys = given.get("role_key"), given.get("content_key")
        if not all(isinstance(key, str | None) for key in keys):
            raise ValueError(f"{path}: role_key and content_key should be names; saw {keys!r}")
        return cls(
            names=names_of([f"{what}={name}" for what, name in texts["columns"].items()], str(path)) | over.names,
            roles=roles_of([f"{theirs}={ours}" for theirs, ours in texts["roles"].items()], str(path)) | over.roles,
            role_key=over.role_key or keys[0],
            content_key=over.content_key or keys[1],
            ignore=(*over.ignore, *_list_of(given.get("ignore"))),
            keep=over.keep,
            train_on=over.train_on,
        )

    @functools.cached_property
    def are_usual(self) -> bool:
        """Whether nothing is called otherwise than usual, and nothing asked for."""
        return self == USUAL


USUAL = Columns()


def _list_of(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def names_of(pairs: Iterable[str], where: str) -> dict[str, str]:
    """Read WHAT=NAME of --columns, e.g. prompt=question. Raises ValueError for what no column holds."""
    return _pairs(pairs, where, NAMES, "prompt=question", "what a column holds")


def roles_of(pairs: Iterable[str], where: str) -> dict[str, str]:
    """Read THEIRS=OURS of --roles, e.g. human=user. Raises ValueError for a role that no template has."""
    found = {}
    for pair in pairs:
        theirs, equals, ours = pair.partition("=")
        if not equals or not theirs or ours not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"{where}: expected THEIRS=OURS with system, user, assistant or tool, as in human=user; saw {pair!r}")
        found[theirs.lower()] = ours
    return found


def _pairs(pairs: Iterable[str], where: str, known: dict, example: str, what: str) -> dict[str, str]:
    found = {}
    for pair in pairs:
        left, equals, right = pair.partition("=")
        if not equals or not right:
            raise ValueError(f"{where}: expected WHAT=NAME, as in {example}; saw {pair!r}")
        if left not in known:
            raise ValueError(f"{where}: {left!r} is not {what}.{nearest(left, known)} Known are {', '.join(known)}")
        found[left] = right
    return found


class Row:
    """A row's columns that hold something, by their names in lower case; remembers which were taken."""

    def __init__(self, values: dict, columns: Columns):
        named = {theirs: ours for ours, theirs in columns.names.items()}
        self.values: dict[str, object] = {}
        self.shown: dict[str, str] = {}  # names as the row has them
        self.empty: set[str] = set()  # columns that are null
        for name, value in values.items():
            if name in columns.ignore:
                continue
            ours = named.get(name) or (name.lower() if name.lower() not in columns.names else f"{name.lower()} ")
            if ours in self.shown:  # two columns that differ in capitals
                ours = name
            self.shown[ours] = name
            if value is None or value != value:  # NaN, which tables have for null
                self.empty.add(ours)
            else:
                self.values[ours] = value
        self.named = set(columns.names)
        self.taken: set[str] = set()
        self.notes: list[str] = []  # what was decided for the user, once for each kind

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, name: str):
        """Return a column's value, which is then used. Raises Refused where it is null or missing."""
        self.taken.add(name)
        if name not in self.values:
            raise Refused(f"{self.shown.get(name, name)} is null" if name in self.empty else f"column {name!r} is missing")
        return self.values[name]

    def structure(self, name: str):
        """Take a column; return the list or object that it holds as text, or its value. It is noted where Python has written it."""
        value = json_of(self.take(name))
        found = python_of(value)
        if found is not value and PYTHON not in self.notes:
            self.notes.append(PYTHON)
        return found

    def take_all(self, names: Iterable[str]) -> None:
        """Count columns as used."""
        self.taken.update(names)

    def find(self, what: str, full: bool = False) -> str | None:
        """Return the name of the column that holds `what`, a key of NAMES; None without one. With `full`, one that is not empty."""
        return next(iter(self.found(what, full)), None)

    def found(self, what: str, full: bool = False) -> list[str]:
        """Return the names of all columns that may hold `what`, the likeliest first."""
        if what in self.named:
            return [what] if what in self.values else []
        return [name for name in NAMES[what] if name in self.values and not (full and is_empty(self.values[name]))]

    def left(self) -> Iterator[str]:
        """Yield the columns that hold something and were not taken."""
        return (name for name, value in self.values.items() if name not in self.taken and not is_empty(value))

    def finish(self, missed: set[str]) -> tuple[str, ...]:
        """Return notes about the row, with one for each column that is not used. Raises Refused where it is one of `missed`."""
        named = {name for what in self.named for name in NAMES[what]}  # others that could be meant were not, as the user says
        for name in self.left():
            shown = shown_name(self.shown[name])
            if name.strip() in missed - named:
                raise Refused(f"column {shown} would be lost: name what it holds with --columns, or leave it out with --ignore {shown}")
            self.notes.append(IGNORED + shown)
        return tuple(self.notes)


def is_empty(value) -> bool:
    """Whether a value says nothing: null, NaN, white space, or a list or an object without anything in it."""
    return (
        value is None or value != value or (isinstance(value, str) and not value.strip()) or (isinstance(value, list | dict) and not value)
    )


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


def likely(rows: list[dict], kind: str) -> str:
    """Return the --columns line that would probably read rows of no known shape; empty where nothing is likely."""
    texts: dict[str, None] = {}  # names of columns that hold texts, in their order
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str) and value.strip() and not re.fullmatch(r"[\w./:-]{0,40}", value):
                texts[name] = None
            elif isinstance(value, list) and value and all(isinstance(one, dict) and {"role", "from"} & one.keys() for one in value):
                return f"--columns messages={name}" if kind == "sft" else ""
    wanted = ("prompt", "answer") if kind == "sft" else ("prompt", "chosen", "rejected")
    common = [name for name in texts if all(name in row for row in rows)]
    guessed = _guess(common, wanted)
    if len(guessed) < len(wanted) and len(common) == len(wanted) == 2:  # no other way to read them, but the other way around
        guessed = dict(zip(wanted, common, strict=True))
    turns = [name for name in rows[0] if all(is_texts(row.get(name)) and len(row[name]) % 2 == 0 for row in rows)]
    if len(guessed) < len(wanted) and len(turns) == 1 and kind == "sft":
        return f"--columns messages={turns[0]}"
    return "--columns " + ",".join(f"{what}={guessed[what]}" for what in wanted) if len(guessed) == len(wanted) else ""


HINTS = {
    "prompt": ("prompt", "question", "instruct", "query", "input", "user", "human", "ask", "task", "problem", "title", "source"),
    "answer": ("answer", "respon", "output", "complet", "reply", "assistant", "target", "solution", "gpt", "model"),
    "chosen": ("chosen", "better", "prefer", "win", "good", "best", "positive", "accept"),
    "rejected": ("reject", "worse", "lose", "loss", "bad", "worst", "negative", "disprefer"),
}  # parts of names, by what such a column likely holds


def _guess(names: list[str], wanted: tuple[str, ...]) -> dict[str, str]:
    """Return which of the names likely holds what, by a part of the name."""
    left, guessed = list(names), {}
    for what in wanted:
        by_name = next((name for hint in HINTS[what] for name in left if hint in name.lower()), None)
        if by_name:
            guessed[what] = by_name
            left.remove(by_name)
    return guessed
