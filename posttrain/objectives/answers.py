"""Adds up token log-probs by answer, and the sums of micro-batches that become a step's metrics."""

from collections.abc import Callable

import numpy as np
import torch

from posttrain.data.packing import MicroBatch

LogProbs = Callable[[MicroBatch], torch.Tensor]  # an engine or a policy: micro-batch -> (N,) float32 log-probs of its targets
Sums = dict[str, torch.Tensor]  # detached scalars by name, of one micro-batch or of several
Examples = dict[str, list[np.ndarray]]  # by name: an array a micro-batch, with one number an example


def answer_sums(logps: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Add up token log-probs (N,) by answer -> (A, 2): the tokens up to the length of the pair's shorter answer, and those beyond it.

    SFT has no pairs, so nothing lies beyond. Sums are float64, since a GPU adds in no fixed order: a float32 sum of a thousand tokens would
    differ from one call to the next.
    """
    sums = torch.zeros(2 * batch.num_answers, dtype=torch.float64, device=logps.device)
    return sums.index_add(0, 2 * batch.answers + batch.beyond, logps.double()).view(-1, 2)


def add_sums(sums: Sums, more: Sums) -> None:
    """Add the sums of one micro-batch to those of a step, in place, in float64."""
    for name, value in more.items():
        sums[name] = sums[name] + value.double() if name in sums else value.double()


def add_examples(examples: Examples, values: dict[str, torch.Tensor]) -> None:
    """Append each named tensor, which has one number per example of a micro-batch, to `examples` as an array on the CPU."""
    for name, tensor in values.items():
        examples.setdefault(name, []).append(tensor.detach().cpu().numpy())
