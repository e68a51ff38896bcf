"""Refuses a name that the user has given to a column, a key or a role and that no row has: a misspelt one would change nothing, unsaid.

Rows are read until every name was seen, which mostly is the first row; all of them only where one is missing.
"""

from collections import defaultdict
from collections.abc import Iterator

from data_prep.shapes.columns import Columns
from data_prep.shapes.conversations import TREE_COLUMNS
from data_prep.shapes.structures import structure_of
from data_prep.sources import Source
from posttrain.common.errors import nearest, shown_name
from posttrain.data.parts import Refused

MOST_SEEN = 1000  # names of each kind that are remembered for the error
MOST_SHOWN = 20  # in it
WHERE = {"column": "row", "column or key": "row", "key": "message", "role": "message", "role or name": "message"}  # what has it


def refuse_unseen(sources: list[Source]) -> None:
    """Raise ValueError for the first name that was given for some of the sources and that no row of them has."""
    missing: dict[tuple[str, str], tuple[str, list[str]]] = {}  # kind and name: the option, and the sources for which it was given
    for source in sources:
        for option, *named in _given(source.columns):
            missing.setdefault(tuple(named), (option, []))[1].append(source.label)
    seen: dict[str, dict[str, None]] = defaultdict(dict)
    for source in sources:
        wanted = {named for named, (_, labels) in missing.items() if source.label in labels}
        for row in source.rows() if wanted else ():
            if isinstance(row, Refused):
                continue
            for kind, name in _names(row, source.columns, {kind for kind, _ in wanted}):
                if len(seen[kind]) < MOST_SEEN:
                    seen[kind][name] = None
                wanted.discard((kind, name))
                missing.pop((kind, name), None)
            if not wanted:
                break
    for (kind, name), (option, labels) in missing.items() if seen else ():
        raise ValueError(
            f"{option}: no {WHERE[kind]} of {', '.join(labels)} has the {kind} {shown_name(name)}.{_instead(name, seen[kind])}"
        )


def _given(columns: Columns) -> Iterator[tuple[str, str, str]]:
    """Yield (option, kind, name) of what the user has named; kinds are those of WHERE."""
    for what, name in columns.names.items():
        yield f"--columns {what}={name}", "column", name
    for name in columns.ignore:
        yield f"--ignore {name}", "column or key", name
    for keep in columns.keep:
        yield f"--keep {keep}", "column", keep.column
    if columns.role_key:
        yield f"--role_key {columns.role_key}", "key", columns.role_key
    if columns.content_key:
        yield f"--content_key {columns.content_key}", "key", columns.content_key
    for theirs, ours in columns.roles.items():
        yield f"--roles {theirs}={ours}", "role", theirs
    for name in columns.train_on.lower().split(",") if columns.train_on not in ("all", "last") else ():
        if name != "assistant":  # as which answers are read that have other names
            yield f"--train_on {columns.train_on}", "role or name", name


def _names(row: dict, columns: Columns, kinds: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (kind, name) of the columns of a row, and of the keys and roles of its messages, as far as they are of the kinds."""
    for name in row:
        yield "column", str(name)
        yield "column or key", str(name)
    if kinds == {"column"}:
        return
    of_a_tree = [row] if TREE_COLUMNS.issubset(row) else []
    for message in [*_objects(list(row.values())), *of_a_tree]:
        for key in message:
            yield "key", str(key)
            yield "column or key", str(key)
        for key in (columns.role_key,) if columns.role_key else ("role", "from"):
            if isinstance(role := message.get(key), str):
                yield "role", role.lower()
                yield "role or name", role.lower()
        if isinstance(name := message.get("name"), str):
            yield "role or name", name.lower()


def _objects(value) -> Iterator[dict]:
    """Yield every object in a value, whatever it lies in; a text of JSON or of Python is read."""
    value = structure_of(value)
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, dict | list | str):
            yield from _objects(inner)


def _instead(name: str, seen: dict[str, None]) -> str:
    """What is there in the place of a name that is not."""
    alike = next((other for other in seen if other.lower() == name.lower()), None)
    names = ", ".join(shown_name(other) for other in list(seen)[:MOST_SHOWN])
    return (f" Did you mean {alike}?" if alike else nearest(name, seen)) + (f" Seen are {names}" if names else " None was seen")
