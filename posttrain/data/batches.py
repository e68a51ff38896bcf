"""The plan of a run: which examples are in step N and how they are cut into micro-batches. Pure functions, the same on all ranks.

An optimizer step is `batch` examples drawn by (seed, epoch, step) alone, so the loss curve cannot depend on the number of GPUs and
resuming is arithmetic. How those examples are dealt to ranks and packed decides speed and memory only. Because every rank computes
the whole plan from the lengths, all know the step's totals and the (equal) number of micro-batches without communicating.
"""

import math
from functools import lru_cache

import numpy as np

PLAN_VERSION = 1  # stored in checkpoints; a plan that would deal other examples gets another number


def steps_per_epoch(num_examples: int, batch: int) -> int:
    """How many steps an epoch has. The last is short where batch does not divide num_examples; nothing is dropped."""
    return math.ceil(num_examples / batch)


def step_examples(num_examples: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices of the examples of optimizer step `step` (1-based)."""
    epoch, within = divmod(step - 1, steps_per_epoch(num_examples, batch))
    return epoch_order(num_examples, seed, epoch)[within * batch : (within + 1) * batch]


@lru_cache(maxsize=2)  # half a second for 10 million examples
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch (counted from 0)."""
    # RandomState, because NumPy guarantees its streams for ever (NEP 19); a Generator's may change between versions
    order = np.random.RandomState([seed, epoch]).permutation(num_examples)
    order.flags.writeable = False
    return order


def share_of_rank(
    indices: np.ndarray, lengths: np.ndarray, *, max_tokens: int, packing: bool, rank: int, world_size: int
) -> list[np.ndarray]:
    """Deal the examples `indices` to all ranks, and return the micro-batches of one; `lengths` are those of all examples, in tokens."""
    ranks = micro_batches(lengths[indices], max_tokens, world_size, packing)
    return [indices[part] for part in ranks[rank]]


def micro_batches(lengths: np.ndarray, max_tokens: int, world_size: int, packing: bool = True) -> list[list[list[int]]]:
    """Cut one step: result[rank][i] is a list of positions into `lengths`, at most max_tokens tokens together, or one without packing.

    Every rank gets the same number of micro-batches, since ZeRO and the collectives need that; a rank with fewer examples than
    micro-batches gets empty ones. Raises ValueError for an example that is longer than max_tokens.
    """
    if len(lengths) and lengths.max() > max_tokens:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into max_tokens_per_gpu={max_tokens}")
    ranks = [_pack(share, lengths, max_tokens) if packing else [[p] for p in share] for share in _deal(lengths, world_size)]
    count = max(1, *map(len, ranks))
    for bins in ranks:
        while len(bins) < count:
            fullest = max(bins, key=len, default=[])
            half = len(fullest) // 2  # splitting beats idling; an empty micro-batch is left only where nothing can be split
            bins.append(fullest[:half])
            del fullest[:half]
    return ranks


def largest_micro_batch(lengths: np.ndarray, batch: int, max_tokens: int, world_size: int, packing: bool = True) -> list[int]:
    """Choose examples with as many tokens as any micro-batch of any step can have, which decides whether memory suffices.

    Some may come twice.
    """
    if not packing:
        return [int(lengths.argmax())]
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order]
    room = min(max_tokens, most_of_a_rank(ascending, batch, world_size))
    chosen = []
    while room >= ascending[0]:
        longest_that_fits = int(np.searchsorted(ascending, room, side="right")) - 1
        chosen.append(int(order[longest_that_fits]))
        room -= int(ascending[longest_that_fits])
    return chosen


def most_of_a_rank(lengths: np.ndarray, batch: int, world_size: int) -> int:
    """How many tokens a rank can have in a step: greedy dealing gives none more than the mean and one example."""
    longest = np.sort(lengths)[-batch:]
    return math.ceil(longest.mean() * batch / world_size) + int(longest[-1])


def _deal(lengths: np.ndarray, world_size: int) -> list[list[int]]:
    """Deal positions to ranks, the longest first, each to the rank with the fewest tokens so far."""
    shares, loads = [[] for _ in range(world_size)], [0] * world_size
    for position in np.argsort(-lengths, kind="stable"):
        rank = loads.index(min(loads))
        shares[rank].append(int(position))
        loads[rank] += int(lengths[position])
    return shares


def _pack(positions: list[int], lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Pack positions first-fit into bins of max_tokens; they come longest first, which makes it first-fit-decreasing."""
    bins, loads = [], []
    for position in positions:
        length = int(lengths[position])
        for i, load in enumerate(loads):
            if load + length <= max_tokens:
                bins[i].append(position)
                loads[i] += length
                break
        else:
            bins.append([position])
            loads.append(length)
    return bins
