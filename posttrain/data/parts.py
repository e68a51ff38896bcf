"""What a conversation is split into: texts, and the ids between them that are the same in every conversation."""

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


class Fixed(NamedTuple):
    """Token ids that the template writes into every conversation: its special tokens."""

    ids: tuple[int, ...]
    trained: bool


Part = Fixed | Text


def trained_range(parts: list[Part]) -> tuple[int, int]:
    """The indices of the first part that is trained, and of the one after the last."""
    trained = [i for i, part in enumerate(parts) if part.trained]
    return trained[0], trained[-1] + 1
