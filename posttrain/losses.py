"""Losses as pure functions of log-probs, each the equation of its paper.

Shapes: P = preference pairs. Log-probs are float32 sums over an answer's tokens. Every function returns one value per pair and
never averages: the caller divides by the step's total, which is what makes the result independent of how a step is cut up.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PairLogps(NamedTuple):
    """Summed answer log-probs of P pairs, each (P,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def dpo_loss(policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """(P,) DPO loss, Eq. 7 of arXiv:2305.18290; with label_smoothing the conservative form, Eq. 3 of ericmitchell.ai/cdpo.pdf."""
    logits = beta * ((policy.chosen - policy.rejected) - (reference.chosen - reference.rejected))
    return -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing


def rewards(policy: PairLogps, reference: PairLogps, beta: float) -> PairLogps:
    """Implicit rewards beta * (log pi - log pi_ref), section 4 of arXiv:2305.18290."""
    return PairLogps(beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected))
