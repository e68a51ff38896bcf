"""A faster kernel is taken only where it proves itself on this machine; what fails is passed over, with the reason."""

import math
from collections.abc import Callable
from typing import TypeVar

from posttrain.common.errors import first_line

T = TypeVar("T")


def tried(trial: Callable[[], T], limit: float = math.inf) -> tuple[T | None, str]:
    """Run a kernel's trial; returns what it measured, or None and why the kernel cannot be used here.

    `limit`: for a trial that measures how far the kernel is from the plain one, the largest difference that rounding explains.
    """
    try:
        measured = trial()
    except Exception as error:  # not installed, not for this card or this torch, no compiler for it: each says so in its own way
        return None, first_line(error)
    if isinstance(measured, float) and not measured <= limit:  # also where it is not a number
        return None, f"it differs by {measured:.1e}"
    return measured, ""
