"""Finds which of several answers to one question is the better one, where the row does not call it chosen.

The answers stand in two columns, as response_0 and response_1, and a verdict or a score for each says which is better; or in a list, with
a rank or a score each.
"""

from collections.abc import Callable
from typing import NamedTuple

from data_prep.shapes.columns import Row
from data_prep.shapes.content_parts import text_of
from data_prep.shapes.messages import clean
from data_prep.shapes.ratings import RANKS, SCORES, is_tie, number_of
from data_prep.shapes.structures import structure_of
from posttrain.data.parts import Refused

STEMS = ("response", "answer", "completion", "output", "conversation", "model_response")
ENDS = (("_0", "_1"), ("_1", "_2"), ("_a", "_b"), ("0", "1"), ("1", "2"), ("_left", "_right"))
WINNERS = ("better_response_id", "better_response", "better", "preferred_response", "preferred", "preference", "human_preference", "winner",
           "chosen", "choice", "verdict", "label", "labels", "vote")  # fmt: skip
SIGNED = ("overall_preference", "preference_strength")  # below 0 where the first is the better one
SCALES = ("score", "rating", "reward")  # of one of two answers
SCORED = ("overall_score", "score", "rating", "fine-grained_score", "pm_score", "reward")  # of one of several, the higher the better
TEXTS = ("answer", "response", "text", "answer_text", "content", "completion", "output")  # keys of its text
LISTS = ("completions", "answers", "responses", "candidates", "generations")


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
                return found if _verdicts(row, found.sides) else None
    return None


def _verdicts(row: Row, sides: tuple[str, str]) -> list[tuple[str, Callable[[], int | None]]]:
    """The columns that say which answer is the better one, with what reads each."""
    found: list[tuple[str, Callable[[], int | None]]] = []
    for name in SIGNED:
        if name in row:
            found.append((name, lambda name=name: _by_sign(row, name)))
    for scale in SCALES:
        for between in ("_", ""):
            names = [f"{scale}{between}{side}" for side in sides]
            if all(name in row for name in names):
                found.append((names[0], lambda names=names: _by_score(row, names)))
    for prefix in ("winner_model_", "winner_"):
        names = [prefix + side for side in sides]
        if all(name in row for name in names):
            found.append((names[0], lambda names=names: _by_score(row, names)))
    if not found:
        found += [(name, lambda name=name: _by_name(row, name, sides)) for name in WINNERS if name in row][:1]
    return found


def _by_sign(row: Row, name: str) -> int | None:
    value = number_of(row.take(name))
    if not isinstance(value, float):
        raise Refused(f"{name} is not a number")
    return None if value == 0 else int(value > 0)


def _by_score(row: Row, names: list[str]) -> int | None:
    first, second = (number_of(row.take(name)) for name in names)
    if not isinstance(first, float) or not isinstance(second, float):
        raise Refused(f"{names[0]} or {names[1]} is not a number")
    return None if first == second else int(second > first)


def _by_name(row: Row, name: str, sides: tuple[str, str]) -> int | None:
    """Which side a verdict names: as a or model_a, as response_1, as 0 and 1 beside response_0 and response_1, or 1 and 2."""
    value = row.take(name)
    if is_tie(value):
        return None
    number = None if isinstance(value, bool) else number_of(value)
    text = str(int(number)) if isinstance(number, float) and number.is_integer() else str(value).strip().lower().split("_")[-1]
    if text not in sides or isinstance(value, bool):
        raise Refused(f"{name} is {value!r}; expected {sides[0]} or {sides[1]}")
    return sides.index(text)


def list_of_answers(row: Row) -> str | None:
    """The name of a column with a list of answers, of which something may say how good each is."""
    return next((name for name in LISTS if isinstance(structure_of(row.values.get(name)), list)), None)


def best_and_worst(row: Row, name: str) -> tuple[str, str]:
    """Read several answers with a rank (1 is the best) or a score (the highest is the best): the best and the worst. Raises Refused."""
    answers = row.structure(name)
    if all(isinstance(one, str) for one in answers):
        ranked = _beside(row, name, answers)
    elif all(isinstance(one, dict) for one in answers):
        ranked = [(_rank(one), _text(one, name)) for one in answers]
    else:
        raise Refused(f"{name} is not a list of answers with a rank or a score")
    ranked = [(rank, text) for rank, text in ranked if rank is not None]
    if len(ranked) < 2:
        raise Refused(f"{name} holds fewer than two answers with a rank or a score")
    (best, chosen), (last, rejected) = (pick(ranked, key=lambda one: one[0]) for pick in (min, max))
    if best == last:
        raise Refused(f"tied: all {name} have the same rank or score")
    row.take_all(name for name in ("models",) if name in row)
    return chosen, rejected


def _beside(row: Row, name: str, answers: list[str]) -> list[tuple[float | None, str]]:
    """Answers with their ranks, from a column beside theirs."""
    scale = next((other for other in row.values if other in SCORES | RANKS and isinstance(structure_of(row.values[other]), list)), None)
    values = [number_of(value) for value in row.structure(scale)] if scale else []
    if len(values) != len(answers) or not all(isinstance(value, float) for value in values):
        raise Refused(f"{name} is a list of texts, without a number for each in scores, ratings or ranks")
    sign = 1 if scale in RANKS else -1
    return [(sign * value, clean(text, f"an answer in {name}")) for value, text in zip(values, answers, strict=True)]


def _rank(answer: dict) -> float | None:
    """A number that is smaller for a better answer; None where it has neither rank nor score."""
    rank, score = answer.get("rank"), next((answer[name] for name in SCORED if answer.get(name) is not None), None)
    value = number_of(score if rank is None else rank)
    return (value if rank is not None else -value) if isinstance(value, float) else None


def _text(answer: dict, column: str) -> str:
    return clean(text_of(next((answer[name] for name in TEXTS if answer.get(name) is not None), None)), f"an answer in {column}")
