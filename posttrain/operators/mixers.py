"""Lets layers that pass on a state from token to token compute packed micro-batches: recurrences, convolutions, linear attention.

Such a layer (a GatedDeltaNet, a Mamba, a short convolution) reads a row from its start, and knows nothing of the examples in it: what an
example leaves in its state and in its convolution would reach the next one. Here it is given each example as a row of its own, padded at
the end, which no token before sees; whatever else the model has stays packed. An answer that shares its prompt is given the prompt's rows
before its own, so that their gradient comes back through both answers.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from posttrain.data.packing import Packing
from posttrain.operators.attention_segments import size_classes

# names of the classes of such layers in transformers (5.23), besides all that have a convolution
NAMES = re.compile(r"Mamba|DeltaNet|ShortConv|LightningAttention|LinearAttention|RwkvSelfAttention|RwkvFeedForward|mLSTM|GatedLinear")
CONVOLUTIONS = (nn.Conv1d,)


class Rectangle(NamedTuple):
    """S examples of about one length."""

    rows: torch.Tensor  # (S, L) the row of each token, a shared prompt's first; padding repeats row 0
    own: torch.Tensor  # (tokens,) places, among the S * L, of what is the segments' own


def mixers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that pass on a state; of nested ones the outermost."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            has_convolution = any(isinstance(part, CONVOLUTIONS) for part in child.children())
            if has_convolution or NAMES.search(type(child).__name__):
                found.append(child)
            else:
                search(child)

    search(model)
    return found


class PackedMixers:
    """Changes the forward pass of a model's mixers, so that each example of a packed micro-batch has a state of its own."""

    def __init__(self, model: nn.Module):
        self.packing: Packing | None = None  # how the rows that come next are divided; None: they are rows of their own
        self.calls = 0  # how often each of them is to be called for that, at least
        self.mixers = mixers_of(model)
        for mixer in self.mixers:
            mixer.forward = partial(self._forward, mixer.forward)

    def restore(self) -> None:
        """Undo the changes."""
        for mixer in self.mixers:
            del mixer.forward

    def _forward(self, forward: Callable, *inputs, **named):
        """Compute a mixer example by example. Inputs (1, T, ...), alone or in tuples, are divided; all others are as they are."""
        packing = self.packing
        if packing is None:
            return forward(*inputs, **named)
        device = next(value.device for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor))
        rectangles, order = rectangles_of(packing, device)
        outputs = []
        for rows, own in with_calls(rectangles, self.calls):
            divided = partial(_mapped, partial(_divided, rows, len(order)))
            output = forward(*map(divided, inputs), **{name: divided(value) for name, value in named.items()})
            outputs.append(_mapped(partial(_own, rows.shape, own), output))
        return _joined(outputs, order)


def _mapped(change: Callable, value):
    """Apply `change` to a tensor, or to those in a tuple; any other value is returned as it is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return tuple(_mapped(change, one) for one in value) if isinstance(value, tuple) else value


def _divided(rows: torch.Tensor, count: int, x: torch.Tensor) -> torch.Tensor:
    """Pick rows (S, L) of x (1, T, ...) -> (S, L, ...); any other tensor is returned as it is."""
    return x[0].index_select(0, rows.flatten()).unflatten(0, rows.shape) if x.dim() > 1 and x.shape[:2] == (1, count) else x


def _own(shape: torch.Size, own: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Pick the segments' own rows of x (S, L, ...) -> (rows, ...); of another tensor, such as a state, nothing is used later."""
    return x.flatten(0, 1).index_select(0, own) if x.shape[:2] == shape else x[:0]


def _joined(outputs: list, order: torch.Tensor):
    """Lay the rectangles' outputs end to end, in the order of the rows: (1, T, ...)."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined([output[number] for output in outputs], order) for number in range(len(first)))
    if not isinstance(first, torch.Tensor) or not sum(map(len, outputs)):
        return first
    return torch.cat(outputs).index_select(0, order).unsqueeze(0)


def rectangles_of(packing: Packing, device: torch.device, each: bool = False) -> tuple[list[Rectangle], torch.Tensor]:
    """Group a Packing's segments by length, or take `each` alone, without padding.

    Also returns, for each of the T rows, its place among the groups' own rows laid end to end.
    """
    with unset_fake_temporarily():  # the planner counts on tensors without values, which these must have
        return _rectangles_of(packing.segments.numpy().tobytes(), device, each)


def with_calls(rectangles: list[Rectangle], calls: int) -> list[Rectangle]:
    """Add rectangles of one row, nothing of which is used, until there are as many as calls that are to be made."""
    nothing = Rectangle(rectangles[0].rows[:1, :1], rectangles[0].own[:0])
    return rectangles + [nothing] * (calls - len(rectangles))


@lru_cache(maxsize=1)  # every layer asks before the next micro-batch comes
def _rectangles_of(segments: bytes, device: torch.device, each: bool) -> tuple[list[Rectangle], torch.Tensor]:
    table = np.frombuffer(segments, np.int64).reshape(-1, 4)
    members = defaultdict(list)
    for number, kind in enumerate(size_classes((table[:, 1] - table[:, 0]) + (table[:, 3] - table[:, 2]))):
        members[number if each else kind].append(number)
    found, order, before = [], np.empty(table[-1, 1], np.int64), 0
    for alike in members.values():
        start, end, prefix_start, prefix_end = table[alike].T[:, :, None]
        own, prefix = end - start, prefix_end - prefix_start
        place = np.arange((prefix + own).max())
        is_own = (place >= prefix) & (place < prefix + own)
        rows = np.where(place < prefix, prefix_start + place, np.where(is_own, start + place - prefix, 0))
        order[rows[is_own]] = before + np.arange(is_own.sum())
        before += int(is_own.sum())
        found.append(Rectangle(torch.from_numpy(rows).to(device), torch.from_numpy(np.flatnonzero(is_own)).to(device)))
    return found, torch.from_numpy(order).to(device)
