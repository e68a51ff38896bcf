"""Chooses the next tokens of many requests in one call: greedy, or drawn from what temperature, top-k and top-p leave."""

from typing import NamedTuple

import numpy as np
import torch

COLD = 1e-5  # at and below this temperature the likeliest token is taken: dividing by it would overflow


class Sampling(NamedTuple):
    """How one request's tokens are chosen. Applied as in transformers and vLLM: penalty, then temperature, top-k, top-p."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # over 1: tokens of the prompt and the answer so far become less likely (Keskar et al. 2019)
    seed: int = 0

    def cuts(self, vocabulary: int) -> bool:
        """Return whether top-k or top-p can take tokens away."""
        return 0 < self.top_k < vocabulary or self.top_p < 1

    def uniform(self, position: int) -> float:
        """Return the random number in [0, 1) for the answer's token at `position`; it depends on nothing but seed and position."""
        return np.random.Generator(np.random.Philox(key=self.seed, counter=position)).random()


def choose(logits: torch.Tensor, asked: list[Sampling], histories: list[list[int]], uniforms: list[float]) -> torch.Tensor:
    """Return the next ids (B,) for float32 logits (B, V), which are changed in place.

    For each row: its sampling settings, the ids before it, and a random number in [0, 1).
    """
    for row, (sampling, history) in enumerate(zip(asked, histories, strict=True)):
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(history)), device=logits.device)
            scores = logits[row, seen]
            logits[row, seen] = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
    chosen = logits.argmax(-1)
    for cut in (False, True):  # apart: the order in which tokens are drawn must not depend on who else is served
        drawn = [row for row, sampling in enumerate(asked) if sampling.temperature > COLD and sampling.cuts(logits.shape[1]) == cut]
        if drawn:
            chosen[drawn] = (_draw_cut if cut else _draw)(logits[drawn], [asked[row] for row in drawn], [uniforms[row] for row in drawn])
    return chosen


def _draw(logits: torch.Tensor, asked: list[Sampling], uniforms: list[float]) -> torch.Tensor:
    """Draw ids (B,) from all tokens, in the vocabulary's order."""
    probabilities = (logits / _column(logits, [sampling.temperature for sampling in asked])).double().softmax(-1)
    return _at(probabilities, uniforms)


def _draw_cut(logits: torch.Tensor, asked: list[Sampling], uniforms: list[float]) -> torch.Tensor:
    """Draw ids (B,) from the tokens that top-k and top-p leave, likeliest first."""
    vocabulary = logits.shape[1]
    top_k = _column(logits, [min(sampling.top_k or vocabulary, vocabulary) for sampling in asked])
    top_p = _column(logits, [sampling.top_p for sampling in asked])
    scaled = logits / _column(logits, [sampling.temperature for sampling in asked])
    scaled, ids = scaled.topk(min(int(top_k.max()), vocabulary), dim=-1)
    scaled = scaled.masked_fill(torch.arange(scaled.shape[1], device=logits.device) >= top_k, float("-inf"))
    probabilities = scaled.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    left_out = (before >= top_p) & (top_p < 1)
    left_out[:, 0] = False  # where top_p is 0 in float32, too
    probabilities = probabilities.masked_fill(left_out, 0)
    return ids.gather(1, _at(probabilities, uniforms)[:, None])[:, 0]


def _at(probabilities: torch.Tensor, uniforms: list[float]) -> torch.Tensor:
    """Return the places (B,) where each row's cumulated probabilities reach the share `uniforms` of their sum."""
    upto = probabilities.cumsum(-1)
    found = torch.searchsorted(upto, _column(upto, uniforms) * upto[:, -1:], right=True)
    return found.clamp(max=probabilities.shape[1] - 1)[:, 0]


def _column(beside: torch.Tensor, values: list) -> torch.Tensor:
    """Return one value a row as a tensor (B, 1), on the device of `beside`; floats in its dtype."""
    return torch.tensor(values, device=beside.device, dtype=beside.dtype if isinstance(values[0], float) else None)[:, None]
