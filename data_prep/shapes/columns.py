"""The columns of a row: under which names people have what, which of them a reader has looked at, and what would be lost.

A reader takes columns by `Row.take`, and what none has taken at the end is not trained on: a column that by its name carries content
refuses the row, any other is told as not used. A null column, or an empty one where it may be left out, is no column.
"""

import functools
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from data_prep.shapes.names import NAMES, is_content, is_switch, near, quoted
from data_prep.shapes.structures import PYTHON, json_of, python_of
from posttrain.common.errors import nearest, shown_name
from posttrain.data.parts import Refused

IGNORED = "column not used: "  # the start of a note about a column that carries no content, as far as its name says


SIGNS = {"=": operator.eq, "!=": operator.ne, ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


class UnknownShape(Refused):
    """A row whose columns are of no known shape."""


class Keep(NamedTuple):
    """A condition of --keep: rows without it are left out."""

    column: str
    sign: str  # a key of SIGNS
    value: str

    def __str__(self):
        return "".join(self)

    def holds(self, value) -> bool:
        """Whether a row's value fulfils it; true and 1 and 1.0 are the same. Raises Refused for a text that should be above or below."""
        seen, wanted = _comparable(value), _comparable(self.value)
        if self.sign not in ("=", "!=") and not isinstance(seen, float):
            raise Refused(f"column {self.column} of --keep {self} is {value!r}, which is no number")
        return SIGNS[self.sign](seen, wanted)


def _comparable(value) -> float | str:
    """A value as a number, true and false and yes and no included, else as text in small letters."""
    text = str(value).strip().lower()
    try:
        return float({"true": "1", "yes": "1", "false": "0", "no": "0"}.get(text, text))
    except ValueError:
        return text


def keep_of(text: str) -> Keep:
    """Read a condition of --keep, as label=true or score>=4. Raises ValueError."""
    found = re.fullmatch(r"(.+?)(>=|<=|!=|=|>|<)(.+)", text)
    if not found:
        raise ValueError(f"--keep {text}: expected COLUMN=VALUE, as in label=true, or !=, >, >=, <, <= in the place of =")
    keep = Keep(*(part.strip() for part in found.groups()))
    if keep.sign not in ("=", "!=") and not isinstance(_comparable(keep.value), float):
        raise ValueError(f"--keep {text}: {keep.value!r} is no number")
    return keep


@dataclass(frozen=True)
class Columns:
    """How the user's columns and messages are called, where it is not as usual: --columns and its like, or FILE.columns.yaml."""

    names: dict[str, str] = field(default_factory=dict)  # what a column holds, a key of NAMES: its name
    roles: dict[str, str] = field(default_factory=dict)  # a role of the rows: user, assistant, system or tool
    role_key: str | None = None  # of a message
    content_key: str | None = None
    ignore: tuple[str, ...] = ()  # columns that are not to be trained on
    keep: tuple[Keep, ...] = ()  # what a row must have
    train_on: str = "all"  # all, last, or the roles or names of assistants, separated by commas
    held_out: bool = False  # rows of a validation or test split are asked for

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
            held_out=over.held_out,
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
        names = (what,) if what in self.named else NAMES[what]
        return [name for name in names if name in self.values and not (full and is_empty(self.values[name]))]

    def left(self) -> Iterator[str]:
        """Yield the columns that hold something and were not taken."""
        return (name for name, value in self.values.items() if name not in self.taken and not is_empty(value))

    def finish(self, missed: set[str]) -> tuple[str, ...]:
        """Return notes about the row, with one for each column that is not used.

        Raises Refused where it is one of `missed`, and where the user has named it.
        """
        named = {name for what in self.named for name in NAMES[what]}  # others that could be meant were not, as the user says
        left, likely = [*self.left()], {}
        if lost := [name for name in left if name in self.named]:
            raise Refused(self.unused(lost[0]))
        for name in left:
            what = near(self.shown[name])
            if (name in NAMES["thinking"] or what == "thinking") and is_switch(self.values[name]):
                continue
            if name.strip() in missed - named:
                likely[name] = None
            elif what and what not in self.named and is_content(what, self.values[name]):
                likely[name] = what if what in NAMES else None
        if likely:
            raise Refused(self._lost(likely))
        self.notes += [IGNORED + shown_name(self.shown[name]) for name in left]
        return tuple(self.notes)

    def unused(self, what: str, because: str = "") -> str:
        """The cause of a row that is read without a column that the user has named as `what`."""
        name = self.shown[what]
        others = ", ".join(sorted(shown_name(self.shown[one]) for one in self.taken & self.shown.keys() - {what}))
        why = because or f"nothing takes it beside {others}"
        named = quoted("--columns", f"{what}={name}")
        return f"column {shown_name(name)}, named by {named}, would be lost: {why}; leave it out with {quoted('--ignore', name)}"

    def _lost(self, likely: dict[str, str | None]) -> str:
        """The cause of a row of which columns would be lost; what each likely holds, where its name says so."""
        names = [shown_name(self.shown[name]) for name in likely]
        what = next((f"{what}={self.shown[name]}" for name, what in likely.items() if what), "")
        named = f"name what {'it holds' if len(names) == 1 else 'they hold'} with {quoted('--columns', what) if what else '--columns'}"
        columns = f"column {names[0]}" if len(names) == 1 else f"columns {', '.join(names)}"
        left_out = quoted("--ignore", ",".join(names))
        return f"{columns} would be lost: {named}, or leave {'it' if len(names) == 1 else 'them'} out with {left_out}"


def is_empty(value) -> bool:
    """Whether a value says nothing: null, NaN, white space, or a list or an object without anything in it."""
    return (
        value is None or value != value or (isinstance(value, str) and not value.strip()) or (isinstance(value, list | dict) and not value)
    )
