"""Packed micro-batches: many examples in one row of tokens, and how the row falls into them."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from posttrain.data.chat import IGNORE


class Segment(NamedTuple):
    start: int  # first row of its queries
    end: int
    prefix_start: int = 0  # rows of the prefix that its queries also see
    prefix_end: int = 0


@dataclass(frozen=True, eq=False)
class Packing:
    """How a row of T tokens falls into segments. Built once per micro-batch and handed to every layer."""

    segments: torch.Tensor  # (segments, 4) int64 on the CPU: a Segment a line, in row order, covering all rows
    cu_seqlens_q: torch.Tensor  # (segments + 1,) int32: where each segment's queries start
    cu_seqlens_k: torch.Tensor  # (segments + 1,) int32: the same for its keys, prefix included
    max_q: int
    max_k: int
    key_rows: torch.Tensor | None  # row of every key where prefixes are shared, else None: keys are the rows as they are


def pack(segments: list[Segment]) -> Packing:
    queries = [s.end - s.start for s in segments]
    keys = [s.end - s.start + s.prefix_end - s.prefix_start for s in segments]
    key_rows = None
    if queries != keys:
        key_rows = torch.cat([torch.cat([torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)]) for s in segments])
    return Packing(torch.tensor(segments), _offsets(queries), _offsets(keys), max(queries), max(keys), key_rows)


def to_device(packing: Packing, device: torch.device) -> Packing:
    values = {field.name: getattr(packing, field.name) for field in fields(packing) if field.name != "segments"}
    return replace(packing, **{n: copied(v, device) for n, v in values.items() if isinstance(v, torch.Tensor)})


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; on a GPU the copy may still be under way, which what is queued after it waits for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _offsets(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


class MicroBatch(NamedTuple):
    """One row of T packed tokens. N positions are trained; A answers are told apart (SFT: examples; DPO: chosen, rejected, ...)."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T), from 0 in each example
    packing: Packing
    rows: torch.Tensor  # (N,) row whose hidden state predicts the target
    targets: torch.Tensor | None  # (N,); None: which would be likeliest is asked
    answers: torch.Tensor  # (N,) index of the answer that the target belongs to
    beyond: torch.Tensor  # (N,) 1 where the target lies beyond the length of the pair's other answer, else 0
    num_answers: int
    reference_sums: torch.Tensor | None = None  # (A, 2) the reference's objectives.answer_sums, where they were computed before

    def to(self, device: torch.device) -> "MicroBatch":
        """Copied, where that is a GPU without waiting: from pinned memory."""
        moved = {n: copied(v, device) for n, v in self._asdict().items() if isinstance(v, torch.Tensor)}
        return self._replace(packing=to_device(self.packing, device), **moved)


class RowBuilder:
    """Appends examples to one row. A token at row i is predicted by the hidden state of the row before it in its own example."""

    def __init__(self):
        self.input_ids, self.positions, self.segments = [], [], []
        self.rows, self.targets, self.answers, self.beyond = [], [], [], []
        self.num_answers = 0

    def add_sequence(self, ids: list[int], labels: list[int]) -> None:
        start = self._append(ids, 0)
        trained = [i for i in range(1, len(ids)) if labels[i] != IGNORE]  # an example's first token has nothing to predict it
        self._train([start + i - 1 for i in trained], [labels[i] for i in trained], len(trained))

    def add_pair(self, prompt: list[int], chosen: list[int], rejected: list[int], share_prompt: bool) -> None:
        start = self._append(prompt + chosen, 0)
        last = start + len(prompt) - 1  # the prompt's last row predicts the first token of both answers
        shorter = min(len(chosen), len(rejected))
        self._train(range(last, last + len(chosen)), chosen, shorter)
        if not share_prompt:
            start = self._append(prompt + rejected, 0)
            self._train(range(start + len(prompt) - 1, start + len(prompt) + len(rejected) - 1), rejected, shorter)
            return
        own = self._append(rejected, len(prompt), prefix=(start, start + len(prompt)))
        self._train([last, *range(own, own + len(rejected) - 1)], rejected, shorter)

    def _append(self, ids: list[int], position: int, prefix: tuple[int, int] = (0, 0)) -> int:
        start = len(self.input_ids)
        self.input_ids += ids
        self.positions += range(position, position + len(ids))
        self.segments.append(Segment(start, start + len(ids), *prefix))
        return start

    def _train(self, rows, targets, shorter: int) -> None:
        self.rows += rows
        self.targets += targets
        self.beyond += [int(i >= shorter) for i in range(len(targets))]
        self.answers += [self.num_answers] * len(targets)
        self.num_answers += 1

    def build(self) -> MicroBatch:
        def tensor(values):
            return torch.tensor(values, dtype=torch.int64)

        return MicroBatch(
            tensor(self.input_ids)[None],
            tensor(self.positions)[None],
            pack(self.segments),
            tensor(self.rows),
            tensor(self.targets),
            tensor(self.answers),
            tensor(self.beyond),
            self.num_answers,
        )
