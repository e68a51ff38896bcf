"""Compares ratings: of a chosen and a rejected answer, in columns of their own, and of several answers.

A pair whose ratings are equal is a tie, and one whose ratings say the contrary is refused: DPO would learn it the wrong way around.
"""

import math
from decimal import Decimal

from data_prep.shapes.columns import Row
from data_prep.shapes.names import words_of
from posttrain.data.parts import Refused

SCORES = {"score", "scores", "rating", "ratings", "reward", "rewards", "rm", "grade", "quality", "utility", "votes", "upvotes", "elo"}
RANKS = {"rank", "ranking", "ranks"}  # the lower the better
MARGINS = {"margin", "diff", "difference", "delta", "gap"}
VERDICTS = ("winner", "status", "verdict", "preference", "better", "outcome", "result", "judgement", "judgment", "vote")
TIES = ("tie", "tied", "draw", "both", "equal", "same", "neither")  # how a verdict begins that prefers none
SIDES = (("chosen", "rejected"), ("preferred", "dispreferred"), ("better", "worse"), ("winner", "loser"))


def number_of(value):
    """A rating as a number where it is one, also as text, as in CSV, or as a decimal of a table; any other as it is."""
    try:
        number = float(value) if isinstance(value, str | int | float | Decimal) else math.nan
    except (ValueError, OverflowError):
        return value
    return number if math.isfinite(number) else value


def is_tie(value) -> bool:
    """Whether a verdict says that no answer is the better one."""
    return isinstance(value, str) and value.strip().lower().startswith(TIES)


def refuse_tie(row: Row) -> None:
    """Raise Refused where both answers are rated the same, or the chosen one below the rejected one."""
    for better in list(row.values):
        words = words_of(better)
        worse = next((other for one, side in SIDES if (other := better.replace(one, side)) != better and other in row), None)
        if worse and not (SCORES | RANKS).isdisjoint(words):
            row.take_all([better, worse])
            _refuse_contrary(better, worse, row, upwards=RANKS.isdisjoint(words))
        elif not MARGINS.isdisjoint(words[-1:]) and (words == ["margin"] or not SCORES.isdisjoint(words)):
            margin = number_of(row.values[better])
            if isinstance(margin, float) and margin <= 0:
                raise Refused(f"tied: {better} is 0" if margin == 0 else f"{better} is below 0")
        elif words in (["is", "tie"], ["tie"], ["tied"]) and str(row.values[better]).strip().lower() in ("true", "1", "1.0", "yes"):
            raise Refused(f"tied: {better} says so")
    _refuse_verdict(row)


def _refuse_contrary(better: str, worse: str, row: Row, *, upwards: bool) -> None:
    high, low = (number_of(row.values[name]) for name in (better, worse))
    if high == low:
        raise Refused(f"tied: {better} equals {worse}")
    if isinstance(high, float) and isinstance(low, float) and (high < low) is upwards:
        raise Refused(f"{better} is {'below' if upwards else 'above'} {worse}")


def _refuse_verdict(row: Row) -> None:
    rating = row.values.get("rating")
    if isinstance(rating, list) and len(rating) == 2 and rating[0] == rating[1]:
        raise Refused("tied: both answers are rated the same")
    for name in VERDICTS:
        value = row.values.get(name)
        if is_tie(value):
            raise Refused(f"tied: {name} is {value}")
        if value in ("rejected", "loser", "worse"):
            raise Refused(f"{name} is {value}")
