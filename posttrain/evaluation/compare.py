"""What scores show: rates with intervals, baselines that need no model, and whether two checkpoints differ at all."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
from scipy import stats

Z = 1.959964  # of the normal distribution, for 95 % on both sides
FEW = 30  # fewer items do not show how much scores vary


class Rate(NamedTuple):
    """A mean score between 0 and 1, with its 95 % interval and the number of items."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: float, n: int) -> Rate:
    """Return the share of hits with its 95 % interval after Wilson (1927), which stays sound at 0 and 1."""
    mean, spread = hits / n, Z * Z / n
    middle = (mean + spread / 2) / (1 + spread)
    half = Z * math.sqrt(mean * (1 - mean) / n + spread / (4 * n)) / (1 + spread)
    return Rate(mean, max(0.0, middle - half), min(1.0, middle + half), n)


def rate(scores: list[float]) -> Rate:
    """Return the mean of scores from 0 to 1 with its 95 % interval: Student's for 30 or more that are not just 0, 0.5 and 1, else Wilson's.

    Wilson's interval is made for scores of 0 and 1. No others of the same mean vary more, so it is wide enough for ties as well, and for
    so few scores that they do not show how much they vary.
    """
    n, total = len(scores), math.fsum(scores)
    if n < FEW or set(scores) <= {0.0, 0.5, 1.0}:
        return wilson(total, n)
    mean, half = total / n, float(stats.t.ppf(0.975, n - 1) * stats.sem(scores))
    return Rate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def p_value(first: list[float], second: list[float]) -> float:
    """Return the two-sided p-value of the difference between two checkpoints' scores on the same items.

    For scores of right and wrong this is McNemar's exact test, on the items that one of them alone has right. For others it is Student's
    paired test, below 30 items a permutation test: how many of all ways to swap the two scores of items give as large a difference.
    """
    differences = [b - a for a, b in zip(first, second, strict=True) if a != b]
    if not differences:
        return 1.0
    if set(differences) <= {-1.0, 1.0}:
        return float(stats.binomtest(sum(one > 0 for one in differences), len(differences)).pvalue)
    if len(first) == 1:
        return 1.0
    if len(first) >= FEW:
        return float(stats.ttest_rel(first, second).pvalue)
    swapped = stats.permutation_test((first, second), _mean_difference, permutation_type="samples", vectorized=True, rng=0)
    return min(1.0, float(swapped.pvalue))


def _mean_difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
    return (second - first).mean(axis)


def holm(p_values: dict) -> dict:
    """Return p-values corrected for their number (Holm 1979): in 95 of 100 tables nothing is called different that is not.

    The k-th smallest of n is multiplied by n - k + 1, and none is below the one before it.
    """
    adjusted, highest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=p_values.get)):
        highest = adjusted[key] = min(1.0, max(highest, p_values[key] * (len(p_values) - rank)))
    return {key: adjusted[key] for key in p_values}


def random_baseline(chances: list[float | None]) -> float | None:
    """Return the mean score of guessing, from each item's chance; None where items have no choices."""
    return None if None in chances else math.fsum(chances) / len(chances)


def majority_baseline(targets: list) -> float:
    """Return the score of always giving the commonest right answer."""
    return Counter(map(str, targets)).most_common(1)[0][1] / len(targets)
