"""Decides which examples go into the prepared folder: duplicates, the validation split, weights; from a few numbers an example."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from data_prep import overlap
from data_prep.proof import text_hash
from data_prep.sources import Sources
from data_prep.staging import Chunk, column

DUPLICATE, NEAR_DUPLICATE = "an exact copy of another row", "a near copy of another row"


class Chosen(NamedTuple):
    """How often each example of the chunks goes to which split, and why some go to none."""

    counts: dict[str, np.ndarray]  # how often each example goes to "train" and to "validation"
    left_out: dict[str, np.ndarray]  # which examples are left out, by cause
    copies: int  # training rows that are exact copies of others
    notes: list[str]  # where the result is not quite what was asked for


def choose(chunks: list[list[Chunk]], sources: Sources, options) -> Chosen:
    """Settle duplicates, validation split and weights. The result depends on the rows and the seed, not on the order of the rows.

    Raises ValueError where nothing is left to train on.
    """
    owner = np.concatenate([np.full(_length(several), index) for index, several in enumerate(chunks)]).astype(int)
    flat = [chunk for several in chunks for chunk in several]
    rows, prompts = column(flat, "_row"), column(flat, "_prompt")
    held_out = owner >= len(sources.training)
    left = np.ones(len(owner), bool)
    left_out: dict[str, np.ndarray] = {}

    def leave_out(which: np.ndarray, cause: str) -> None:
        """Note the cause, for those of the examples that nothing has ruled out yet."""
        left_out[cause] = left_out.get(cause, False) | (which & left)
        left[which] = False

    if options.duplicates != "keep":
        for group in (~held_out, held_out):
            members = np.flatnonzero(group)
            copy = group.copy()
            copy[members[np.unique(rows[members], return_index=True)[1]]] = False
            leave_out(copy, DUPLICATE)
    if options.duplicates == "near":
        leave_out(overlap.near_copies(flat, left & ~held_out), NEAR_DUPLICATE)
    if held_out.any():
        limit = 1000 if options.val_size is None else options.val_size
        validation = _by_prompt(prompts, options.seed, left & held_out, limit)
        leave_out(held_out & ~validation, "held out by the upstream, beyond --val_size")
        leave_out(~held_out & np.isin(prompts, prompts[validation]), "its prompt is in the validation split")
    else:
        usable = int(left.sum())
        limit = min(1000, usable // 100) if options.val_size is None else options.val_size
        if limit and limit >= usable:
            raise ValueError(f"--val_size {limit} leaves nothing of {usable} rows to train on")
        validation = _by_prompt(prompts, options.seed, left, limit)
    counts = (left & ~validation & ~held_out).astype(int)
    for index, source in enumerate(sources.training):
        mine = np.flatnonzero((owner == index) & (counts > 0))
        whole, rest = divmod(source.weight * len(mine), len(mine)) if len(mine) else (0, 0)
        counts[mine] = int(whole)
        if round(rest):
            order = mine[np.argsort(_ranks(rows[mine], options.seed + 1), kind="stable")]
            counts[order[: round(rest)]] += 1
        if source.weight < 1 and len(mine):
            leave_out((owner == index) & left & ~validation & (counts == 0), f"left out by the weight {source.weight:g}")
    if not counts.any():
        raise ValueError(f"no row can be trained on: {_causes(chunks, left_out)}")
    assert not np.isin(prompts[counts > 0], prompts[validation & left]).any(), "a validation prompt is in training"
    found, notes = int((validation & left).sum()), []
    if options.val_size is not None and found < options.val_size:
        why = "the upstream's own split has no more" if held_out.any() else "rows that begin with the same message stay together"
        notes.append(f"--val_size {options.val_size} was asked for, {found} rows are there: {why}")
    kept = rows[counts > 0]
    copies = len(kept) - len(np.unique(kept)) if options.duplicates == "keep" else 0
    if copies:
        notes.append(f"{copies:,} of {len(kept):,} training rows are exact copies of others; --duplicates drop leaves them out")
    return Chosen({"train": counts, "validation": (validation & left).astype(int)}, left_out, copies, notes)


def _length(chunks: list[Chunk]) -> int:
    """How many examples some chunks hold."""
    return sum(len(chunk.table()) for chunk in chunks)


def _ranks(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Draw a uint64 for each number, the same for the same number and seed (splitmix64)."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64(text_hash(f"seed {seed}"))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _by_prompt(prompts: np.ndarray, seed: int, among: np.ndarray, limit: int) -> np.ndarray:
    """Choose up to `limit` of the examples `among`, all examples of a prompt or none; a mask."""
    members = np.flatnonzero(among)
    values, sizes = np.unique(prompts[members], return_counts=True)
    order = np.argsort(_ranks(values, seed), kind="stable")
    taken, total = [], 0
    for position in order:
        if total + sizes[position] <= limit:
            taken.append(values[position])
            total += int(sizes[position])
        if total == limit:
            break
    return among & np.isin(prompts, np.array(taken, np.uint64))


def _causes(chunks: list[list[Chunk]], left_out: dict[str, np.ndarray]) -> str:
    """A list, in words, of why examples were dropped or left out."""
    total = Counter(cause for several in chunks for chunk in several for _, cause in chunk.facts["dropped"])
    total.update({cause: int(which.sum()) for cause, which in left_out.items() if which.any()})
    return "; ".join(f"{count} x {cause}" for cause, count in total.most_common()) or "the source is empty"
