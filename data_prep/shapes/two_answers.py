"""Finds which of several answers to one question is the better one, where the row does not call it chosen.

The answers stand in two columns, as response_0 and response_1, and a verdict or a score for each says which is better; or in a list, with
a rank or a score each.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from data_prep.shapes.columns import Row
from data_prep.shapes.content_parts import text_of
from data_prep.shapes.messages import clean
from data_prep.shapes.names import LABELS, LISTS, words_of
from data_prep.shapes.ratings import PRAISE, RANKS, SCORES, SIGNED, is_tie, number_of, other_side, rated
from data_prep.shapes.structures import structure_of
from posttrain.common.places import in_this_form
from posttrain.data.parts import Refused

STEMS = ("response", "answer", "completion", "output", "conversation", "model_response")
ENDS = (("_0", "_1"), ("_1", "_2"), ("_a", "_b"), ("0", "1"), ("1", "2"), ("_left", "_right"))
WINNERS = ("better_response_id", "better_response", "better", "preferred_response", "preferred", "preference", "human_preference", "winner",
           "chosen", "choice", "verdict", "label", "labels", "vote")  # fmt: skip
BETTER = PRAISE | {"winner", "helpfulness"}  # words in the names of two columns of which the higher is of the better answer
SCORED = ("overall_score", "score", "rating", "fine-grained_score", "pm_score", "reward")  # of one of several, the higher the better
TEXTS = ("answer", "response", "text", "answer_text", "content", "completion", "output")  # keys of its text


class TwoAnswers(NamedTuple):
    """The names of two columns with answers, and what names them apart, in small letters: 0 and 1, a and b."""

    first: str
    second: str
    sides: tuple[str, str]

    def winner(self, row: Row) -> int:
        """0 or 1: which of the answers is the better one. Raises Refused for a tie, and where verdicts contradict each other."""
        said = {name: read() for name, read in _verdicts(row, self.sides)}
        if None in said.values():
            raise Refused(f"tied: {next(name for name, winner in said.items() if winner is None)} prefers none")
        if len(set(said.values())) > 1:
            raise Refused(f"{' and '.join(said)} contradict each other about the better answer")
        row.notes.append(f"of {self.first} and {self.second} the better one by {next(iter(said))}")
        return next(iter(said.values()))


def two_answers(row: Row) -> TwoAnswers | None:
    """The columns of a row with two answers, where something says which one is better; else None."""
    for stem in STEMS:
        for one, other in ENDS:
            if stem + one in row and stem + other in row:
                found = TwoAnswers(stem + one, stem + other, (one.strip("_"), other.strip("_")))
                return found if more_answers(row, found) or _verdicts(row, found.sides) else None
    return None


def more_answers(row: Row, two: TwoAnswers) -> list[str]:
    """The names of all columns with answers where there are more than two, as response_1, response_2 and response_3; else none."""
    stem, last = two.second.removesuffix(two.sides[1]), two.sides[1]
    names = [two.first, two.second]
    while len(last) == 1 and last.isalnum() and stem + (last := chr(ord(last) + 1)) in row:
        names.append(stem + last)
    return names if len(names) > 2 else []


def best_of_columns(row: Row, two: TwoAnswers, names: list[str]) -> tuple[str, str]:
    """The names of the best and the worst of several columns with answers, by scores or ranks of the same ends. Raises Refused."""
    ends = [name.removeprefix(two.first.removesuffix(two.sides[0])) for name in names]
    for first in [name for name in row.values if name not in names and not {*words_of(name)}.isdisjoint(SCORES | RANKS)]:
        scales = [first, *(other_side(first, (ends[0], end), row.values) for end in ends[1:])]
        values = [number_of(row.values[name]) if name else None for name in scales]
        if all(isinstance(value, float) for value in values):
            row.take_all([*names, *(name for name in scales if name)])
            upwards = {*words_of(first)}.isdisjoint(RANKS)
            ranked = sorted(zip(((-value if upwards else value) for value in values if isinstance(value, float)), names, strict=True))
            if ranked[0][0] == ranked[-1][0]:
                raise Refused(f"tied: all of {', '.join(names)} have the same rank or score")
            row.notes.append(f"of {len(names)} answers the best and the worst by {first}")
            return ranked[0][1], ranked[-1][1]
    all_of = f"{', '.join(names)} are {len(names)} answers"
    raise Refused(f"{all_of}, without a score or a rank for each, as in score_{ends[0]}: leave all but two out with --ignore")


def _verdicts(row: Row, sides: tuple[str, str]) -> list[tuple[str, Callable[[], int | None]]]:
    """The columns that say which answer is the better one, with what reads each."""
    found: list[tuple[str, Callable[[], int | None]]] = []
    for name in SIGNED:
        if name in row:
            found.append((name, lambda name=name: _by_sign(row, name)))
    for name in row.values:
        other, words = other_side(name, sides, row.values), {*words_of(name), *re.findall("[0-9]+", name)}
        are_numbers = other and all(isinstance(rated(row.values[one]), float) for one in (name, other))
        if other and not words.isdisjoint(SCORES | RANKS | (BETTER if are_numbers else set())):
            found.append((name, lambda names=(name, other): _by_score(row, names)))
        elif not other and sides[0] in words and not words.isdisjoint(PRAISE) and rated(row.values[name]) in (0, 1):
            found.append((name, lambda name=name: 1 - int(rated(row.take(name)))))
    named = [name for name in WINNERS if name in row]
    names = [name for name in named if is_tie(row.values[name]) or _place(row.values[name], sides) is not None]
    if not found and not names:
        names = named[:1]  # which is refused with its value
    return found + [(name, lambda name=name: _by_name(row, name, sides)) for name in names]


def _by_sign(row: Row, name: str) -> int | None:
    value = number_of(row.take(name))
    if not isinstance(value, float):
        raise Refused(f"{name} is not a number")
    return None if value == 0 else int(value > 0)


def _by_score(row: Row, names: tuple[str, str]) -> int | None:
    first, second = (rated(row.take(name)) for name in names)
    if not isinstance(first, float) or not isinstance(second, float):
        raise Refused(f"{names[0]} or {names[1]} is not a number")
    return None if first == second else int((second > first) is RANKS.isdisjoint(words_of(names[0])))


def _by_name(row: Row, name: str, sides: tuple[str, str]) -> int | None:
    """Which side a verdict names: as a or model_a, as response_1, as 0 and 1 beside response_0 and response_1, or 1 and 2."""
    value = row.take(name)
    if is_tie(value):
        return None
    place = _place(value, sides)
    if place is None:
        raise Refused(f"{name} is {value!r}; expected {sides[0]} or {sides[1]}")
    return place


def _place(value, sides: tuple[str, str]) -> int | None:
    """Which side a verdict names, 0 or 1; None where it names neither."""
    number = None if isinstance(value, bool) else number_of(value)
    text = str(int(number)) if isinstance(number, float) and number.is_integer() else re.split("[_ -]", str(value).strip().lower())[-1]
    return sides.index(text) if text in sides and not isinstance(value, bool) else None


def list_of_answers(row: Row) -> str | None:
    """The name of a column with a list of answers, of which something may say how good each is."""
    return next((name for name in LISTS if isinstance(structure_of(row.values.get(name)), list)), None)


def best_and_worst(row: Row, name: str) -> tuple[str, str]:
    """Read several answers with a rank (1 is the best) or a score (the highest is the best): the best and the worst. Raises Refused."""
    answers = row.structure(name)
    if len(answers) < 2:
        how = in_this_form(f"one answer is for data_prep/prepare_sft.py, with --columns answer={name}")
        raise Refused(f"{name} holds fewer than two answers, which a pair takes: {how}")
    if all(isinstance(one, str) for one in answers):
        scales = _beside(row, name, len(answers))
        texts = [clean(text, f"an answer in {name}") for text in answers]
    elif all(isinstance(one, dict) for one in answers):
        scales = {scale: [_number(one, scale) for one in answers] for scale in ("rank", "score")}
        texts = [_text(one, name) for one in answers]
    else:
        raise Refused(f"{name} is not a list of answers with a rank or a score")
    orders = {scale: [(value, text) for value, text in zip(values, texts, strict=True) if value is not None]
              for scale, values in scales.items()}  # fmt: skip
    orders = {scale: order for scale, order in orders.items() if len(order) > 1}
    if not orders:
        raise Refused(f"{name} holds fewer than two answers with a rank or a score")
    (scale, ranked), *others = orders.items()
    (best, chosen), (last, rejected) = (pick(ranked, key=lambda one: one[0]) for pick in (min, max))
    if best == last:
        raise Refused(f"tied: all {name} have the same rank or score")
    for other, order in others:
        values = {text: value for value, text in order}
        if chosen in values and rejected in values and values[chosen] > values[rejected]:
            raise Refused(f"{scale} and {other} of {name} contradict each other about the better answer")
    if len(ranked) < len(texts):
        row.notes.append(f"answers in {name} without a rank or a score left out")
    row.take_all(name for name in ("models",) if name in row)
    return chosen, rejected


def _beside(row: Row, name: str, count: int) -> dict[str, list[float]]:
    """Columns beside several answers that have a number for each, smaller for a better one."""
    scales = {}
    for scale in row.values:
        values = structure_of(row.values[scale]) if scale in SCORES | RANKS | LABELS else None
        numbers = [rated(value) for value in values] if isinstance(values, list) else []
        if len(numbers) == count and all(isinstance(value, float) for value in numbers):
            scales[scale] = [value if scale in RANKS else -value for value in numbers]
    if not scales:
        raise Refused(f"{name} is a list of texts, without a number for each in scores, ratings or ranks")
    for scale in scales:
        row.structure(scale)
    return scales


def _number(answer: dict, scale: str) -> float | None:
    """A number that is smaller for a better answer, its rank or its score; None where it has none."""
    value = number_of(
        answer.get("rank") if scale == "rank" else next((answer[name] for name in SCORED if answer.get(name) is not None), None)
    )
    return (value if scale == "rank" else -value) if isinstance(value, float) else None


def _text(answer: dict, column: str) -> str:
    return clean(text_of(next((answer[name] for name in TEXTS if answer.get(name) is not None), None)), f"an answer in {column}")
