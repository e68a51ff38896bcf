"""Preference losses as pure functions of answer log-probs, each the equation of its paper.

Shapes: P = preference pairs. Log-probs are sums over an answer's tokens; lengths are its token counts. Every loss returns one
value per pair, (P,), and never averages: the caller divides by the step's total, so the result does not depend on the micro-batches.

A loss reads exactly the options in its signature; a recipe that sets another one is refused. Symbols: pi = policy, ref = reference,
D(y) = log pi(y) - log ref(y), delta = D(chosen) - D(rejected), logsig = log-sigmoid.

Recipes read the losses' names and options before torch is imported, so losses use methods of tensors, and import within functions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class PairLogps(NamedTuple):
    """One value per answer of P pairs, each (P,): summed log-probs, or token counts."""

    chosen: torch.Tensor
    rejected: torch.Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """A registered loss function, with the facts about it that recipes and start checks need."""

    function: Callable[..., torch.Tensor]
    at_start: Callable[..., float] | None  # options -> its value where policy and reference agree; None: it has no reference
    usual_beta: tuple[float, float]  # a beta outside of it gets a warning
    needs_smoothing: bool  # at label_smoothing 0 it is undefined, or another loss
    is_of_the_margin: bool  # it reads the reference only as chosen minus rejected, so a uniform reference cancels out

    @property
    def reads(self) -> set[str]:
        """The names of the function's parameters: log-probs, lengths and options."""
        return set(inspect.signature(self.function).parameters)

    def __call__(self, policy: PairLogps, reference: PairLogps | None, lengths: PairLogps, options: dict[str, float]) -> torch.Tensor:
        """Return the loss of each pair, (P,); `options` may hold more than the function reads."""
        given = {"policy": policy, "reference": reference, "lengths": lengths, **options}
        return self.function(**{name: given[name] for name in self.reads})


LOSSES: dict[str, PreferenceLoss] = {}
LN_2 = math.log(2)


def preference_loss(at_start, usual_beta=(0.01, 1.0), needs_smoothing=False, is_of_the_margin=False):
    """Register the decorated function in LOSSES under its name; the arguments are PreferenceLoss's fields."""

    def register(function):
        LOSSES[function.__name__] = PreferenceLoss(function, at_start, usual_beta, needs_smoothing, is_of_the_margin)
        return function

    return register


@preference_loss(lambda beta, label_smoothing: LN_2, is_of_the_margin=True)
def sigmoid(policy, reference, beta, label_smoothing):
    """DPO, Eq. 7 of arXiv:2305.18290; with label_smoothing the conservative form, Eq. 3 of ericmitchell.ai/cdpo.pdf."""
    logits = beta * delta(policy, reference)
    return -logsigmoid(logits) * (1 - label_smoothing) - logsigmoid(-logits) * label_smoothing


@preference_loss(lambda beta, label_smoothing: LN_2, needs_smoothing=True, is_of_the_margin=True)
def robust(policy, reference, beta, label_smoothing):
    """Robust DPO, arXiv:2403.00409: unbiased if each preference is flipped with probability label_smoothing."""
    logits = beta * delta(policy, reference)
    return (-logsigmoid(logits) * (1 - label_smoothing) + logsigmoid(-logits) * label_smoothing) / (1 - 2 * label_smoothing)


@preference_loss(lambda beta: 1.0, is_of_the_margin=True)
def hinge(policy, reference, beta):
    """SLiC's hinge loss (arXiv:2305.10425) on DPO's margin, as in arXiv:2309.06657."""
    return (1 - beta * delta(policy, reference)).relu()


@preference_loss(lambda beta: 1 / (4 * beta**2), is_of_the_margin=True)
def ipo_sum(policy, reference, beta):
    """IPO with log-probs summed over tokens, Eq. 17 of arXiv:2310.12036 as it is written (and in OpenRLHF); beta is its tau."""
    return (delta(policy, reference) - 1 / (2 * beta)) ** 2


@preference_loss(lambda beta: 1 / (4 * beta**2), is_of_the_margin=True)
def ipo_mean(policy, reference, lengths, beta):
    """IPO with log-probs averaged over tokens, as in TRL: the squared target no longer scales with length. Its beta is not ipo_sum's."""
    return (delta_per_token(policy, reference, lengths) - 1 / (2 * beta)) ** 2


@preference_loss(lambda beta: LN_2, usual_beta=(1.0, 20.0), is_of_the_margin=True)
def sigmoid_norm(policy, reference, lengths, beta):
    """DPO on log-probs averaged over tokens, arXiv:2411.15124 (Tulu 3), where beta is 5."""
    return -logsigmoid(beta * delta_per_token(policy, reference, lengths))


@preference_loss(
    lambda beta, label_smoothing: -LN_2 - 0.5 * math.log1p(-label_smoothing) - 0.5 * math.log(label_smoothing),
    needs_smoothing=True,
    is_of_the_margin=True,
)
def exo_pair(policy, reference, beta, label_smoothing):
    """EXO, Eq. 16 of arXiv:2402.00856: reverse KL from the policy's preference to the labels'; label_smoothing is epsilon, 1e-3 there."""
    logits = beta * delta(policy, reference)
    wins, loses = logsigmoid(logits), logsigmoid(-logits)
    return wins.exp() * (wins - math.log1p(-label_smoothing)) + loses.exp() * (loses - math.log(label_smoothing))


@preference_loss(lambda beta: 2 * LN_2)
def nca_pair(policy, reference, beta):
    """NCA, noise-contrastive alignment of a pair, arXiv:2402.05369: it keeps the chosen answer's likelihood from falling."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@preference_loss(lambda beta: 1 / (2 * beta**2), usual_beta=(1e-3, 1.0))
def sppo_hard(policy, reference, beta):
    """SPPO, self-play preference optimization, Eq. 4.7 of arXiv:2405.00675 with a winning probability of 1; beta is 1 / its eta."""
    chosen, rejected = log_ratios(policy, reference)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@preference_loss(lambda beta: 1.0)
def apo_zero(policy, reference, beta):
    """APO-zero, anchored preference optimization for chosen answers better than the model's own, Eq. 7 of arXiv:2408.06266."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return (-chosen).sigmoid() + rejected.sigmoid()


@preference_loss(lambda beta: 1.0)
def apo_down(policy, reference, beta):
    """APO-down, for chosen answers worse than the model's own: both fall, the rejected one further. Eq. 8 of arXiv:2408.06266."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


@preference_loss(None, usual_beta=(1.0, 20.0))
def simpo(policy, lengths, beta, simpo_gamma):
    """SimPO, Eq. 6 of arXiv:2405.14734: the reward is the mean log-prob of a token, gamma its target margin. It has no reference."""
    chosen, rejected = per_token(policy, lengths)
    return -logsigmoid(beta * (chosen - rejected) - simpo_gamma)


@preference_loss(None)
def orpo(policy, lengths, beta):
    """ORPO, Eq. 6 of arXiv:2403.07691: the chosen answer's NLL plus beta (its lambda) times the log-odds-ratio loss. No reference."""

    def log_odds(logp):  # of the geometric mean probability; the clamp keeps it below 1, where odds are infinite
        return logp - (-logp.clamp(max=-1e-6).expm1()).log()

    chosen, rejected = per_token(policy, lengths)
    return -chosen - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


def rewards(policy: PairLogps, reference: PairLogps | None, lengths: PairLogps, beta: float) -> PairLogps:
    """Return implicit rewards, beta * D (section 4 of arXiv:2305.18290); without a reference beta * mean token log-prob, as in SimPO."""
    chosen, rejected = per_token(policy, lengths) if reference is None else log_ratios(policy, reference)
    return PairLogps(beta * chosen, beta * rejected)


def log_ratios(policy: PairLogps, reference: PairLogps) -> PairLogps:
    """Return D(chosen) and D(rejected), (P,) each."""
    return PairLogps(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def delta(policy: PairLogps, reference: PairLogps) -> torch.Tensor:
    """Return D(chosen) - D(rejected), (P,)."""
    return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)


def per_token(logps: PairLogps, lengths: PairLogps) -> PairLogps:
    """Return the mean log-prob of a token of each answer, (P,) each."""
    return PairLogps(logps.chosen / lengths.chosen, logps.rejected / lengths.rejected)


def delta_per_token(policy: PairLogps, reference: PairLogps, lengths: PairLogps) -> torch.Tensor:
    """Return delta with every D divided by its answer's tokens, (P,)."""
    chosen, rejected = per_token(log_ratios(policy, reference), lengths)
    return chosen - rejected


def logsigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 / (1 + exp(-x)))."""
    from torch.nn import functional

    return functional.logsigmoid(x)
