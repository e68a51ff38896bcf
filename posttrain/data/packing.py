"""Packed micro-batches: many examples in one row of tokens, and how the row is divided among them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from posttrain.data.parts import IGNORE

Ids = Sequence[int] | np.ndarray


class Segment(NamedTuple):
    """Rows [start, end) of a micro-batch: each sees the rows of its segment up to itself, and those of a shared prefix (a DPO prompt)."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0  # equal to prefix_start where there is none


@dataclass(frozen=True, eq=False)
class Packing:
    """How a row of T tokens is divided into segments. Built once for each micro-batch and handed to every layer."""

    segments: torch.Tensor  # (segments, 4) int64 on the CPU: a Segment in each line, in row order, covering all rows
    lengths: torch.Tensor  # (segments,) int64 on the CPU: how many positions each segment's example has, its shared prefix included
    cu_seqlens_q: torch.Tensor  # (segments + 1,) int32: where each segment's queries start
    cu_seqlens_k: torch.Tensor  # (segments + 1,) int32: the same for its keys, prefix included
    max_q: int
    max_k: int
    key_rows: torch.Tensor | None  # the row of each key where prefixes are shared; None: the keys are the rows as they are


def pack(segments: list[Segment]) -> Packing:
    """The Packing of a row of tokens that is divided into `segments`, which follow each other."""
    table = np.array(segments, np.int64)
    start, end, prefix_start, prefix_end = table.T
    queries, prefixes = end - start, prefix_end - prefix_start
    keys, key_rows = prefixes + queries, None
    if prefixes.any():
        key_rows = torch.from_numpy(_ranges(table[:, [2, 0]].ravel(), table[:, [3, 1]].ravel()))
    offsets = _offsets(queries), _offsets(keys)
    return Packing(torch.from_numpy(table), torch.from_numpy(keys), *offsets, int(queries.max()), int(keys.max()), key_rows)


def to_device(packing: Packing, device: torch.device) -> Packing:
    """The Packing with its tensors on the device, except the segments and their lengths, which are read on the CPU."""
    values = {field.name: getattr(packing, field.name) for field in fields(packing) if field.name not in ("segments", "lengths")}
    return replace(packing, **{n: copied(v, device) for n, v in values.items() if isinstance(v, torch.Tensor)})


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. On a GPU the copy may still be under way; what is queued after it waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    """Where stretches of these lengths start when they follow each other, and where the last one ends: (lengths + 1,) int32."""
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))


def _ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers of all ranges [starts[i], ends[i]), one range after another."""
    lengths = ends - starts
    return np.repeat(starts - lengths.cumsum() + lengths, lengths) + np.arange(lengths.sum())


class MicroBatch(NamedTuple):
    """One row of T packed tokens, N of them trained, as parts of A answers: an example of SFT is one, a pair of DPO is two."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T), from 0 in each example
    packing: Packing
    rows: torch.Tensor  # (N,) row whose hidden state predicts the target
    targets: torch.Tensor | None  # (N,); None asks for the likeliest tokens in their place
    answers: torch.Tensor  # (N,) index of the answer that the target belongs to
    beyond: torch.Tensor  # (N,) 1 where the target lies beyond the length of the pair's other answer, else 0
    answer_lengths: torch.Tensor  # (A,) how many targets each answer has
    reference_sums: torch.Tensor | None = None  # (A, 2) the reference's objectives.answer_sums, where they were computed before

    @property
    def num_answers(self) -> int:
        """How many answers the micro-batch has."""
        return len(self.answer_lengths)

    def to(self, device: torch.device) -> "MicroBatch":
        """The micro-batch on the device; to a GPU it is copied from pinned memory without waiting."""
        moved = {n: copied(v, device) for n, v in self._asdict().items() if isinstance(v, torch.Tensor)}
        return self._replace(packing=to_device(self.packing, device), **moved)


class RowBuilder:
    """Appends examples to one row of tokens, in which each token is predicted by the row before it in its own example.

    Token ids and labels may be arrays or lists.
    """

    def __init__(self):
        self.length = 0
        self.segments: list[Segment] = []
        self.answer_lengths: list[int] = []
        # arrays that build joins to the tensors of a MicroBatch
        self.input_ids, self.positions, self.rows, self.targets, self.answers, self.beyond = ([] for _ in range(6))

    def add_sequence(self, ids: Ids, labels: Ids) -> None:
        """Append an example whose tokens are trained where the label is not IGNORE; labels are as long as ids."""
        ids, labels = np.asarray(ids, np.int64), np.asarray(labels, np.int64)
        start = self._append(ids)
        before = np.flatnonzero(labels[1:] != IGNORE)  # an example's first token has nothing to predict it
        self._train(start + before, labels[before + 1], len(before))

    def add_pair(self, prompt: Ids, chosen: Ids, rejected: Ids, share_prompt: bool) -> None:
        """Append a prompt with two answers, which are trained whole; with share_prompt the prompt stands in the row once for both."""
        prompt, chosen, rejected = (np.asarray(ids, np.int64) for ids in (prompt, chosen, rejected))
        start = self._append(np.concatenate([prompt, chosen]))
        last = start + len(prompt) - 1  # the prompt's last row predicts the first token of both answers
        shorter = min(len(chosen), len(rejected))
        self._train(np.arange(last, last + len(chosen)), chosen, shorter)
        if share_prompt:
            own = self._append(rejected, prefix=(start, start + len(prompt)))
            rows = np.concatenate([[last], np.arange(own, own + len(rejected) - 1)])
        else:
            last = self._append(np.concatenate([prompt, rejected])) + len(prompt) - 1
            rows = np.arange(last, last + len(rejected))
        self._train(rows, rejected, shorter)

    def _append(self, ids: np.ndarray, prefix: tuple[int, int] = (0, 0)) -> int:
        """Append a segment, which also sees the rows of `prefix`; returns its first row."""
        start, seen = self.length, prefix[1] - prefix[0]
        self.length += len(ids)
        self.segments.append(Segment(start, self.length, *prefix))
        self.input_ids.append(ids)
        self.positions.append(np.arange(seen, seen + len(ids)))
        return start

    def _train(self, rows: np.ndarray, targets: np.ndarray, shorter: int) -> None:
        """Note the next answer's targets and the rows that predict them; targets from number `shorter` on lie beyond the other answer."""
        self.rows.append(rows)
        self.targets.append(targets)
        self.answers.append(np.full(len(targets), len(self.answer_lengths)))
        self.beyond.append((np.arange(len(targets)) >= shorter).astype(np.int64))
        self.answer_lengths.append(len(targets))

    def build(self) -> MicroBatch:
        """The micro-batch of what was added so far, which is at least one example."""

        def joined(arrays: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(arrays))

        return MicroBatch(
            joined(self.input_ids)[None],
            joined(self.positions)[None],
            pack(self.segments),
            joined(self.rows),
            joined(self.targets),
            joined(self.answers),
            joined(self.beyond),
            torch.tensor(self.answer_lengths, dtype=torch.int64),
        )
