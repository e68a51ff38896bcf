"""Finds messages in a template's output, by the output for placeholders in their place.

The output must equal that skeleton with each placeholder replaced by its text, or by a form of it that templates are known to write.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from posttrain.data.parts import Refused

PRIVATE = "\ue000"  # no message may hold it
PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
# what templates do to a message that stays its text
STRIPPED = (
    *(lambda text: text, str.strip, str.lstrip, str.rstrip),
    *(lambda text: text.strip("\n"), lambda text: text.lstrip("\n"), lambda text: text.rstrip("\n")),
)
MOST_TRIES = 5000  # places that are looked at for a message that the template has rewritten


class Slot(NamedTuple):
    """A text of a message, and whether the template may rewrite it: nothing of it is trained."""

    text: str
    free: bool


def placeholder(number: int) -> str:
    """Return what stands for a text in a skeleton; two texts never have the same."""
    return f"{PRIVATE}{number}\ue001"


def split_skeleton(skeleton: str) -> tuple[list[str], list[int]]:
    """Return a skeleton's fixed texts, and the numbers of the placeholders between them."""
    found = PLACEHOLDER.split(skeleton)
    return found[0::2], [int(number) for number in found[1::2]]


def find_texts(real: str, fixed: list[str], slots: list[Slot], specials: Iterable[str]) -> list[str]:
    """Return the slots' texts as written: real == fixed[0] + text 0 + fixed[1] + ... Raises Refused where they cannot be told for sure.

    A free slot may hold anything, where there is one way only to divide the output, and no special token that its text has not.
    """
    if real.startswith(fixed[0]):
        texts = _known(real, fixed, slots)
        if texts is not None:
            return texts
        for texts in _divisions(real, fixed, slots):
            for text, slot in zip(texts, slots, strict=True):
                if any(token in text and token not in slot.text for token in specials):
                    raise Refused("the template writes special tokens into a message")
            return texts
    raise Refused("the template rewrites a message, so what is trained cannot be proven")


def _forms(slot: Slot) -> Iterator[str]:
    """Yield the forms in which templates write a text: stripped, and, where nothing of it is trained, as JSON."""
    yield from (change(slot.text) for change in STRIPPED)
    if slot.free:
        yield json.dumps(slot.text, ensure_ascii=False)[1:-1]


def _known(real: str, fixed: list[str], slots: list[Slot]) -> list[str] | None:
    """The texts, if each is in one of the known forms."""
    found, at = [], len(fixed[0])
    for slot, after in zip(slots, fixed[1:], strict=True):
        text = next((form for form in _forms(slot) if real.startswith(form + after, at)), None)
        if text is None:
            return None
        found.append(text)
        at += len(text) + len(after)
    return found if at == len(real) else None


def _divisions(real: str, fixed: list[str], slots: list[Slot]) -> Iterator[list[str]]:
    """Yield the only division of the output in which free slots hold anything; nothing where there is none, or more than one."""
    found: list[list[str]] = []
    waiting: list[tuple[int, list[str]]] = [(len(fixed[0]), [])]
    for _ in range(MOST_TRIES):
        if not waiting or len(found) > 1:
            break
        at, texts = waiting.pop()
        if len(texts) == len(slots):
            if at == len(real):
                found.append(texts)
            continue
        slot, after = slots[len(texts)], fixed[len(texts) + 1]
        last = len(texts) + 1 == len(slots)
        ends = {at + len(form) for form in _forms(slot) if real.startswith(form + after, at)}
        if slot.free:
            ends |= {len(real) - len(after)} & {*range(at, len(real) + 1)} if last else _places(real, after, at)
        waiting += [(end + len(after), [*texts, real[at:end]]) for end in ends if real.startswith(after, end)]
    if not waiting and len(found) == 1:
        yield found[0]


def _places(real: str, text: str, start: int) -> set[int]:
    """Where a text stands from `start` on; empty for an empty text, which stands everywhere."""
    places: set[int] = set()
    at = real.find(text, start) if text else -1
    while at >= 0 and len(places) < MOST_TRIES:
        places.add(at)
        at = real.find(text, at + 1)
    return places
