"""Compares what rates two answers whose order a row has already said: ratings of each, a margin between them, or a verdict.

A pair whose ratings are equal is a tie, and one whose ratings say the contrary is refused: DPO would learn it the wrong way around.
"""

import math
import re
from collections.abc import Iterator
from decimal import Decimal

from data_prep.shapes.columns import Row
from data_prep.shapes.names import ABOUT, is_truth, words_of
from data_prep.shapes.structures import structure_of
from posttrain.data.parts import Refused

SCORES = {"score", "scores", "rating", "ratings", "reward", "rewards", "rm", "grade", "quality", "utility", "votes", "upvotes", "elo"}
RANKS = {"rank", "ranking", "ranks"}  # the lower the better
MARGINS = {"margin", "diff", "difference", "delta", "gap"}
# words in the name of a truth value that says which answer is the better one, or a right one
PRAISE = {"better", "best", "correct", "good", "preferred", "wins", "won", "win", "right", "accepted", "passed", "label", "chosen"}
VERDICTS = ("winner", "status", "verdict", "preference", "better", "outcome", "result", "judgement", "judgment", "vote", "preferred")
VERDICTS += ("better_response", "better_response_id", "preferred_response", "human_preference", "annotator_preference", "winning_model")
POINTERS = {"winner", "preference", "verdict", "preferred"}  # last words of other such names
SIGNED = ("overall_preference", "preference_strength")  # below 0 where the first is the better one
TIES = ("tie", "tied", "draw", "both", "equal", "same", "neither")  # how a verdict begins that prefers none
# a verdict that names an answer by its place, which says nothing beside chosen and rejected
PLACE = re.compile(r"(model|response|answer|completion|output|assistant|option)?[ _-]?([ab]|[012](\.0)?|first|second|left|right)")
SIDES = (("chosen", "rejected"), ("preferred", "dispreferred"), ("preferred", "rejected"), ("accepted", "rejected"))
SIDES += (("better", "worse"), ("best", "worst"), ("winner", "loser"), ("winning", "losing"), ("win", "lose"))
SIDES += (("positive", "negative"), ("good", "bad"))
# words of names that measure two answers, and do not rate them
SIZES = {*ABOUT, "logp", "logps", "logprob", "logprobs", "loss", "nll", "perplexity", "ppl", "chars", "words", "size", "turns", "time"}
SIZES |= {"latency", "cost", "seed", "temperature", "prob", "sim", "similarity"}


def number_of(value):
    """A rating as a number where it is one, also as text, as in CSV, or as a decimal of a table; any other as it is."""
    try:
        number = float(value) if isinstance(value, str | int | float | Decimal) else math.nan
    except (ValueError, OverflowError):
        return value
    return number if math.isfinite(number) else value


def rated(value):
    """A rating or a truth value as a number, where it is one; any other as it is."""
    return float(str(value).strip().lower() in ("true", "yes")) if is_truth(value) else number_of(value)


def is_tie(value) -> bool:
    """Whether a verdict says that no answer is the better one."""
    return isinstance(value, str) and value.strip().lower().startswith(TIES)


def refuse_contrary(row: Row) -> None:
    """Raise Refused where what a row has not used yet rates both answers the same, or the chosen one below the rejected one."""
    said = {name: value for column in list(row.left()) for name, value in _leaves(column, row.values[column])}
    shown = {name: row.shown.get(name, name) for name in said}
    twins = {name: worse for name in said if (worse := _twin(name, said))}
    for name, value in said.items():
        words = words_of(shown[name])
        if name in twins:
            _compare(name, twins[name], words, said, row)
        elif name in twins.values():
            continue
        elif not MARGINS.isdisjoint(words[-1:]) and (words == ["margin"] or not SCORES.isdisjoint(words)):
            _refuse_margin(shown[name], number_of(value))
        elif words in (["is", "tie"], ["tie"], ["tied"]) and rated(value) == 1:
            raise Refused(f"tied: {shown[name]} says so")
        elif not PRAISE.isdisjoint({*words} - {"chosen", "rejected"}) and ("chosen" in words) != ("rejected" in words):
            _refuse_truth(shown[name], rated(value), of_rejected="rejected" in words)
        elif name in SIGNED and number_of(value) == 0:
            raise Refused(f"tied: {shown[name]} is 0")
        elif name in VERDICTS or (words and words[-1] in POINTERS):
            _refuse_verdict(shown[name], value)
        elif isinstance(value, list) and len(value) == 2 and not SCORES.isdisjoint(words) and rated(value[0]) == rated(value[1]):
            raise Refused("tied: both answers are rated the same")


def _leaves(name: str, value) -> Iterator[tuple[str, object]]:
    """Yield a column, or what an object in it says under each of its keys, by names as scores.chosen."""
    value = structure_of(value)
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield f"{name}.{key}".lower(), inner


def _twin(name: str, said: dict) -> str | None:
    """The name of the value that says of the rejected answer what `name` says of the chosen one, if there is one."""
    for one, side in SIDES:
        if (other := name.replace(one, side)) != name and other in said:
            return other
    return other_side(name, ("w", "l"), said)


def other_side(name: str, sides: tuple[str, str], names) -> str | None:
    """The one of `names` that differs from this one in a word alone, the first side's by the second's."""
    words = re.split(r"([^a-z0-9]+|(?<=[a-z])(?=[0-9]))", name)
    other = "".join(sides[1] if word == sides[0] else word or "" for word in words)
    return other if other != name and other in names else None


def _compare(better: str, worse: str, words: list[str], said: dict, row: Row) -> None:
    """Compare two values. Raises Refused where they rate the answers, and the contrary; other numbers that say it are told."""
    high, low = rated(said[better]), rated(said[worse])
    if not isinstance(high, float) or not isinstance(low, float):
        return
    upwards = RANKS.isdisjoint(words)
    first, second = row.shown.get(better, better), row.shown.get(worse, worse)
    contrary = f"{first} is {'below' if upwards else 'above'} {second}"
    is_rating = not (SCORES | RANKS).isdisjoint(words)
    if is_rating or ({high, low} <= {0, 1} and not PRAISE.isdisjoint({*words} - {"chosen"})):
        row.take_all({better, worse} & row.values.keys())
        if high == low and is_rating:
            # an object beside the row that is no rating itself, as UltraFeedback's metadata, where one pair in nine is so
            if better not in row.values and SCORES.isdisjoint(words_of(better.partition(".")[0])):
                row.notes.append(f"{first} equals {second}, which is told only: the row's own order stands")
                return
            raise Refused(f"tied: {first} equals {second}")
        if high != low and (high < low) is upwards:
            raise Refused(contrary)
    elif high < low and SIZES.isdisjoint(words):
        row.notes.append(f"{contrary}, which decides nothing: it is no rating by its name")


def _refuse_margin(name: str, margin) -> None:
    if isinstance(margin, float) and margin <= 0:
        raise Refused(f"tied: {name} is 0" if margin == 0 else f"{name} is below 0")


def _refuse_truth(name: str, value, *, of_rejected: bool) -> None:
    """Raise Refused for what says that the chosen answer is not the better one, as is_chosen_better, or that the rejected one is."""
    if value == of_rejected:
        raise Refused(f"{name} is {bool(value)}: the chosen answer would not be the better one")


def _refuse_verdict(name: str, value) -> None:
    """Raise Refused for a verdict that prefers none, the rejected answer, or one by a place that the row does not say."""
    text = str(value).strip().lower()
    if is_tie(value):
        raise Refused(f"tied: {name} is {value}")
    if text in ("rejected", "loser", "worse"):
        raise Refused(f"{name} is {value}")
    if name.lower() != "status" and (isinstance(value, bool) or PLACE.fullmatch(text)):
        raise Refused(f"{name} is {value}, and nothing says whether that is the chosen answer: leave it out with --ignore {name}")
