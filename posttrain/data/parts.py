"""What a rendered conversation consists of: texts and special tokens, then token ids, with labels that say which are trained."""

from typing import NamedTuple

IGNORE = -100  # label of a token that is not trained


class Refused(ValueError):
    """A conversation that cannot be rendered or used; its text is the cause, the same for all such conversations."""


class Text(NamedTuple):
    """A text between two special tokens. No token straddles the border of an answer's body."""

    before: str
    body: str
    trained: bool  # the body
    answer: bool = False  # the body is an answer, though not trained: its tokens are those that it has where it is


class Encoded(NamedTuple):
    """Token ids: special tokens of the template, or what a Text became."""

    ids: list[int]
    trained: bool
    text: str | None = None  # what a trained body's ids were made from
    header: tuple[int, ...] | list[int] = ()  # the ids right before a trained body, since the last special token
    sound: bool = True  # text that spells a special token has not become that token
    apart: bool = False  # a token would have straddled the border between header and body, so they were encoded apart


Part = Encoded | Text


class Rendered(NamedTuple):
    """A conversation as it is stored and trained on."""

    input_ids: list[int]
    labels: list[int]  # same length; IGNORE where the token is not trained, else the token itself


def trained_range(parts: list[Part]) -> tuple[int, int]:
    """The indices of the first part that is trained, and of the one after the last."""
    trained = [i for i, part in enumerate(parts) if part.trained]
    return trained[0], trained[-1] + 1


def joined(parts: list[Encoded]) -> Rendered:
    """Join the parts of a conversation to its ids and labels."""
    ids, labels = [], []
    for part in parts:
        ids += part.ids
        labels += part.ids if part.trained else [IGNORE] * len(part.ids)
    return Rendered(ids, labels)


def trained_spans(labels: list[int]) -> list[tuple[int, int]]:
    """The runs of trained tokens, as [start, end)."""
    import numpy as np  # only here: command lines are read with what is above, before anything that takes long

    trained = np.concatenate([[False], np.asarray(labels) != IGNORE, [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return list(zip(edges[0::2], edges[1::2], strict=True))
