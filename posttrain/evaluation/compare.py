"""What scores say: rates with intervals, baselines that need no model, and whether two checkpoints differ at all."""

import math
from collections import Counter
from typing import NamedTuple

Z = 1.959964  # 95 %


class Rate(NamedTuple):
    value: float
    low: float
    high: float
    n: int


def wilson(hits: float, n: int) -> Rate:
    """Share of hits with its 95 % interval after Wilson (1927), which stays sound at 0 and 1."""
    mean, spread = hits / n, Z * Z / n
    middle = (mean + spread / 2) / (1 + spread)
    half = Z * math.sqrt(mean * (1 - mean) / n + spread / (4 * n)) / (1 + spread)
    return Rate(mean, max(0.0, middle - half), min(1.0, middle + half), n)


def rate(scores: list[float]) -> Rate:
    """Mean with its 95 % interval: Wilson's for right-or-wrong scores, normal for shares between."""
    n, total = len(scores), math.fsum(scores)
    if set(scores) <= {0.0, 1.0}:
        return wilson(total, n)
    mean = total / n
    if n == 1:
        return Rate(mean, 0.0, 1.0, n)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (n - 1))
    half = Z * deviation / math.sqrt(n)
    return Rate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def p_value(first: list[float], second: list[float]) -> float:
    """Of a difference as large as seen between two checkpoints on the same items, if they were equally good; two-sided.

    McNemar's exact test on the items that one of them alone has right; for scores between 0 and 1, a normal test of the mean difference.
    """
    differences = [b - a for a, b in zip(first, second, strict=True) if a != b]
    if not differences:
        return 1.0
    if set(differences) <= {-1.0, 1.0}:
        n, better = len(differences), sum(one > 0 for one in differences)
        fewer = min(better, n - better)
        tail = sum(math.comb(n, k) for k in range(fewer + 1))
        return min(1.0, 2 * tail / 2**n)
    n = len(first)
    if n == 1:
        return 1.0
    mean = math.fsum(differences) / n
    squares = math.fsum(one * one for one in differences)
    error = math.sqrt(max(0.0, squares - n * mean * mean) / (n - 1) / n)
    return math.erfc(abs(mean) / error / math.sqrt(2)) if error else 0.0


def holm(p_values: dict) -> dict:
    """The same p-values, for as many comparisons as there are: of all that are called different, none is so in 95 of 100 tables by chance.

    Holm (1979): the k-th smallest of n times n - k + 1, and none below the one before it.
    """
    adjusted, highest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=p_values.get)):
        highest = adjusted[key] = min(1.0, max(highest, p_values[key] * (len(p_values) - rank)))
    return {key: adjusted[key] for key in p_values}


def random_baseline(chances: list[float | None]) -> float | None:
    """Of guessing, where there are choices."""
    return None if None in chances else math.fsum(chances) / len(chances)


def majority_baseline(targets: list) -> float:
    """Of always giving the commonest right answer."""
    return Counter(map(str, targets)).most_common(1)[0][1] / len(targets)
