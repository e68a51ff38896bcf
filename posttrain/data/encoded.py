"""The token ids of conversations: of their parts, and joined to rows with labels that say which tokens are trained."""

import itertools
from typing import NamedTuple

import numpy as np

from posttrain.data.parts import IGNORE

NONE = np.zeros(0, np.int32)


class Encoded(NamedTuple):
    """The token ids of a part of a conversation."""

    ids: np.ndarray  # (tokens,) int32
    trained: bool
    text: str | None = None  # what a trained body's ids were made from
    header: np.ndarray = NONE  # the ids right before a trained body, since the last special token
    sound: bool = True  # text that spells a special token has not become that token
    apart: bool = False  # a token would have straddled the border between header and body, so they were encoded apart
    lacks: bool = False  # the unknown token is among the ids: the vocabulary lacks characters of the text


class Rendered(NamedTuple):
    """A conversation as it is stored and trained on."""

    input_ids: list[int]
    labels: list[int]  # same length; IGNORE where the token is not trained, else the token itself


class Row(NamedTuple):
    """A conversation as it is stored and trained on, as arrays."""

    input_ids: np.ndarray  # (tokens,) int32
    labels: np.ndarray  # the same shape; IGNORE where the token is not trained, else the token itself
    trained: int  # how many labels have a loss: nothing predicts the first token

    def cut(self, most: int) -> "Row":
        """The first so many tokens of it."""
        labels = self.labels[:most]
        return Row(self.input_ids[:most], labels, int(np.count_nonzero(labels[1:] != IGNORE)))


def rows_of(conversations: list[list[Encoded]]) -> list[Row]:
    """Join the parts of each conversation to a row."""
    parts = [part for encoded in conversations for part in encoded]
    if not parts:
        return [Row(NONE, NONE, 0) for _ in conversations]
    ids = np.concatenate([part.ids for part in parts])
    sizes = np.fromiter((len(part.ids) for part in parts), np.int64, len(parts))
    trained = np.repeat(np.fromiter((part.trained for part in parts), bool, len(parts)), sizes)
    labels = np.where(trained, ids, np.int32(IGNORE))
    bounds = np.concatenate([[0], np.cumsum(sizes)])[np.cumsum([0, *map(len, conversations)])]
    before = np.concatenate([[0], np.cumsum(trained)])
    losses = (before[bounds[1:]] - before[np.minimum(bounds[:-1] + 1, bounds[1:])]).tolist()
    places = zip(itertools.pairwise(bounds.tolist()), losses, strict=True)
    return [Row(ids[begin:end], labels[begin:end], count) for (begin, end), count in places]


def joined(parts: list[Encoded]) -> Rendered:
    """Join the parts of one conversation to its ids and labels, as lists."""
    row = rows_of([parts])[0]
    return Rendered(row.input_ids.tolist(), row.labels.tolist())


def trained_spans(labels: list[int] | np.ndarray) -> list[tuple[int, int]]:
    """The runs of trained tokens, as [start, end)."""
    trained = np.concatenate([[False], np.asarray(labels) != IGNORE, [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return list(zip(edges[0::2], edges[1::2], strict=True))


def counted(among: list[int], ids: np.ndarray) -> np.ndarray | None:
    """How many of the ids before each position are `among` some, (tokens + 1,); None where there are none to look for."""
    return np.concatenate([[0], np.cumsum(np.isin(ids, among))]) if among else None
