"""Log-probs of tokens, added up by the answer that they belong to."""

from collections.abc import Callable

import numpy as np
import torch

from posttrain.data.packing import MicroBatch

LogProbs = Callable[[MicroBatch], torch.Tensor]  # an engine: micro-batch -> (N,) float32 log-probs


def add_examples(examples: dict[str, list[np.ndarray]], values: dict[str, torch.Tensor]) -> None:
    for name, tensor in values.items():
        examples.setdefault(name, []).append(tensor.detach().cpu().numpy())


def answer_lengths(batch: MicroBatch) -> torch.Tensor:
    """(A,) trained tokens of each answer."""
    return torch.bincount(batch.answers, minlength=batch.num_answers)


def answer_sums(logps: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """(N,) token log-probs -> (A, 2): their sum up to the length of the pair's shorter answer, and beyond. SFT has no pairs: no beyond.

    In float64, since a GPU adds in no fixed order: a float32 sum of a thousand tokens would differ from one call to the next.
    """
    sums = torch.zeros(2 * batch.num_answers, dtype=torch.float64, device=logps.device)
    return sums.index_add(0, 2 * batch.answers + batch.beyond, logps.double()).view(-1, 2)
