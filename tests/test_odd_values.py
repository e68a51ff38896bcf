"""Odd values in every field of every known shape: a row is read, or refused in one bounded sentence, and never ends in a traceback."""

import copy
import datetime
import random
from collections.abc import Iterator
from decimal import Decimal

import pytest
import test_shapes
import test_two_answers
from test_tools import TOOLS, form

from data_prep.convert import parts_of_rows
from data_prep.examples import SFT, Settings
from data_prep.shapes.columns import USUAL
from data_prep.shapes.conversations import read_row
from posttrain.data.parts import Refused

ODD = [
    *(None, True, False, 0, 1, -1, 2.5, float("nan"), float("inf"), 10**400, Decimal("1.5"), Decimal("NaN"), datetime.datetime(2020, 1, 1)),
    *(b"x", "", " ", "x", "null", "nan", "[]", "{}", "[null]", "[[1]]", '{"a": null}', '{"a": {"b": [1]}}', '"x"', "5", "[" * 3000),
    *([], {}, [None], [[]], [[[1]]], [{}], [1], ["x"], [True], {"a": None}, {"a": [1]}, "{1: (2,)}", {"role": None}, [{"role": ["x"]}]),
    *({"text": 5}, [{"text": None}], {"parts": 5}, {"parts": [None]}, {"name": []}, [{"name": {}}], [{"function": []}]),
    *(
        ["user", "assistant"],
        [["q", "a"]],
        [["q"]],
        {"role": [], "content": []},
        {"role": ["user"], "content": [None]},
        {"type": ["object"]},
    ),
    *([{"type": "text", "text": None}], [{"type": {"a": 1}}], {"input": 1, "output": None}, [{"rank": "x"}, {"rank": 10**400}]),
]


def rows_of(test) -> list[dict]:
    """The rows that a test of shapes reads."""
    return [case if isinstance(case, dict) else case[0] for case in test.pytestmark[0].args[1]]


SHAPES = {
    "sft": rows_of(test_shapes.test_sft_shapes) + rows_of(test_shapes.test_messages_of_parts_say_what_those_of_texts_do),
    "dpo": rows_of(test_shapes.test_dpo_shapes) + rows_of(test_two_answers.test_the_better_answer_is_found),
}


def places(value, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value in a row."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(value, path: tuple, new):
    """A copy of a value with another at a path."""
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


def bounded(cause: Refused) -> None:
    assert 3 < len(str(cause)) < 1000 and "\n" not in str(cause), str(cause)[:300]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_odd_value_anywhere_is_read_or_refused(kind):
    read = 0
    for row in SHAPES[kind]:
        for path in places(row):
            for odd in ODD:
                changed = put(row, path, copy.deepcopy(odd))
                for either in ("sft", "dpo"):
                    item = read_row(either, changed, USUAL)
                    if isinstance(item, Refused):
                        bounded(item)
                    read += not isinstance(item, Refused)
    assert read > 3000


def test_an_odd_key_anywhere_is_read_or_refused():
    draw, keys = random.Random(0), ["name", "weight", "tool_calls", "reasoning", "score", "train", "split", "content", "tools", "system"]
    for row in (row for rows in SHAPES.values() for row in rows):
        for path in [(), *places(row)]:
            inside = row
            for key in path:
                inside = inside[key]
            for name in draw.sample(keys, 4) if isinstance(inside, dict) else ():
                changed = put(row, path, inside | {name: copy.deepcopy(draw.choice(ODD))})
                for kind in SHAPES:
                    item = read_row(kind, changed, USUAL)
                    assert not isinstance(item, Refused) or not bounded(item)


def test_what_is_read_of_odd_calls_and_tools_is_written_or_refused():
    kind, written = SFT(form(TOOLS), Settings(4096)), 0
    rows = [row for row in SHAPES["sft"] if "tools" in row or "tool_calls" in str(row)]
    for row in rows:
        for path in places(row):
            for odd in ODD:
                item = read_row("sft", put(row, path, copy.deepcopy(odd)), USUAL)
                if not isinstance(item, Refused):
                    (item,) = parts_of_rows(kind, [(0, item)]).items
                    assert not isinstance(item, Refused) or not bounded(item)
                    written += not isinstance(item, Refused)
    assert len(rows) > 3 and written > 100
