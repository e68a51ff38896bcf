"""What is minimised: from a micro-batch's log-probs to its share of the step's loss, and the sums that become metrics.

SFT divides by the step's trained tokens, DPO by its pairs, always the totals of the whole step over all ranks. Metrics travel as
sums, are reduced over ranks once a step, and carry TRL's names where TRL has them.
"""

from collections.abc import Callable

import numpy as np
import torch

from posttrain.config import DPORecipe
from posttrain.data import MicroBatch, Split
from posttrain.losses import LOSSES, PairLogps, rewards

LogProbs = Callable[[MicroBatch], torch.Tensor]  # an engine: micro-batch -> (N,) float32 log-probs


class SFT:
    """Negative log-likelihood, averaged over the trained tokens of a step."""

    sums = ("nll",)

    def __init__(self, policy: LogProbs):
        self.policy = policy

    def totals(self, split: Split, indices) -> dict[str, int]:
        return {"tokens": int(split.trained[indices].sum())}

    def loss(self, batch: MicroBatch, totals: dict[str, int], examples: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """This micro-batch's share of the step's loss, and the detached sums named in `sums`.

        `examples` gets a tensor with a number of each example added to the list under each name of one.
        """
        logps = self.policy(batch)
        if examples is not None:
            lengths = answer_lengths(batch)
            _add(examples, {"nll": -answer_sums(logps, batch).sum(1) / lengths.clamp(min=1), "answer_tokens": lengths})
        nll = -logps.sum()
        return nll / totals["tokens"], nll.detach()[None]

    def metrics(self, sums: dict[str, float], totals: dict[str, int]) -> dict[str, float]:
        return {"loss": sums["nll"] / totals["tokens"]}

    def example_losses(self, batch: MicroBatch) -> torch.Tensor:
        """The mean token loss of each example of the micro-batch."""
        lengths = answer_lengths(batch).clamp(min=1)
        return -answer_sums(self.policy(batch), batch).sum(1) / lengths


class DPO:
    """A preference loss, averaged over the pairs of a step, plus an optional NLL of the chosen answers per token."""

    sums = ("loss", "nll", "accuracies", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected", "likelier")

    def __init__(self, policy: LogProbs, reference: LogProbs | None, recipe: DPORecipe):
        """`reference`: the engine beside the policy; None where the loss has none, or the data brings its log-probs."""
        self.policy, self.reference = policy, reference
        self.preference_loss, self.has_reference = LOSSES[recipe.loss], needs_reference(recipe)
        self.beta, self.ld_alpha, self.nll_weight = recipe.beta, recipe.ld_alpha, recipe.chosen_nll_weight
        self.options = {"beta": recipe.beta, "label_smoothing": recipe.label_smoothing, "simpo_gamma": recipe.simpo_gamma}

    @property
    def loss_at_start(self) -> float:
        """The preference loss where policy and reference agree."""
        return self.preference_loss.at_start(**{name: value for name, value in self.options.items() if name in self.preference_loss.reads})

    def totals(self, split: Split, indices) -> dict[str, int]:
        return {"pairs": len(indices), "tokens": int(split.trained[indices].sum())}

    def loss(self, batch: MicroBatch, totals: dict[str, int], examples: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As SFT.loss. With a reference beside, every rank must call this equally often: its ZeRO-3 gathers are collective."""
        sums, lengths = answer_sums(self.policy(batch), batch), answer_lengths(batch)
        policy, reference = self.pairs(sums), self.reference_logps(batch)
        losses = self.preference_losses(policy, reference, lengths)
        nll = -sums[0::2].sum()
        share = (losses.sum() / totals["pairs"] + self.nll_weight * nll / totals["tokens"]).float()
        with torch.no_grad():
            reward = rewards(policy, reference, PairLogps(lengths[0::2], lengths[1::2]), self.beta)
            accurate = (reward.chosen > reward.rejected).double()  # a tie counts as wrong, as in TRL
            means = sums.sum(1) / lengths.clamp(min=1)
            likelier = (means[0::2] > means[1::2]).double()
            if examples is not None:
                margins = reward.chosen - reward.rejected
                _add(examples, {"rewards/chosen": reward.chosen, "rewards/rejected": reward.rejected, "rewards/margins": margins})
                _add(examples, {"chosen_tokens": lengths[0::2], "rejected_tokens": lengths[1::2]})
            columns = (losses, accurate, reward.chosen, reward.rejected, policy.chosen, policy.rejected, likelier)
            loss_sum, *others = (column.sum() for column in columns)
            return share, torch.stack([loss_sum, nll, *others])

    @torch.no_grad()
    def reference_logps(self, batch: MicroBatch) -> PairLogps | None:
        """The reference's log-probs; zeros where it is taken as uniform, None where the loss has none."""
        if "reference" not in self.preference_loss.reads:
            return None
        if not self.has_reference:
            zeros = torch.zeros(batch.num_answers // 2, dtype=torch.float64, device=batch.rows.device)
            return PairLogps(zeros, zeros)
        if self.reference is None:
            return self.pairs(batch.reference_sums)
        return self.pairs(answer_sums(self.reference(batch), batch))

    def pairs(self, sums: torch.Tensor) -> PairLogps:
        """(A, 2) answer_sums -> log-probs of pairs, the tail of the longer answer weighted by ld_alpha (LD-DPO, arXiv:2409.06411)."""
        logps = sums[:, 0] + self.ld_alpha * sums[:, 1]
        return PairLogps(logps[0::2], logps[1::2])

    def metrics(self, sums: dict[str, float], totals: dict[str, int]) -> dict[str, float]:
        mean = {name: value / totals["pairs"] for name, value in sums.items()}
        nll = sums["nll"] / totals["tokens"]
        return {
            "loss": mean["loss"] + self.nll_weight * nll,
            "rewards/chosen": mean["rewards_chosen"],
            "rewards/rejected": mean["rewards_rejected"],
            "rewards/margins": mean["rewards_chosen"] - mean["rewards_rejected"],
            "rewards/accuracies": mean["accuracies"],
            "logps/chosen": mean["logps_chosen"],
            "logps/rejected": mean["logps_rejected"],
            "logps/accuracies": mean["likelier"],  # share of pairs whose chosen answer the policy finds likelier, per token
            "nll_loss": nll,
            "preference_loss": mean["loss"],
        }

    def example_losses(self, batch: MicroBatch) -> torch.Tensor:
        """The preference loss of each pair of the micro-batch. As `loss`, a collective with a reference beside."""
        policy = self.pairs(answer_sums(self.policy(batch), batch))
        return self.preference_losses(policy, self.reference_logps(batch), answer_lengths(batch))

    def preference_losses(self, policy: PairLogps, reference: PairLogps | None, lengths: torch.Tensor) -> torch.Tensor:
        """(P,) losses of P pairs; lengths (2 P,) as answer_lengths gives them."""
        return self.preference_loss(policy, reference, PairLogps(lengths[0::2], lengths[1::2]), self.options)


def _add(examples: dict[str, list[np.ndarray]], values: dict[str, torch.Tensor]) -> None:
    for name, tensor in values.items():
        examples.setdefault(name, []).append(tensor.detach().cpu().numpy())


def needs_reference(recipe: DPORecipe) -> bool:
    return "reference" in LOSSES[recipe.loss].reads and not recipe.reference_free


def answer_lengths(batch: MicroBatch) -> torch.Tensor:
    """(A,) trained tokens of each answer."""
    return torch.bincount(batch.answers, minlength=batch.num_answers)


def answer_sums(logps: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """(N,) token log-probs -> (A, 2): their sum up to the length of the pair's shorter answer, and beyond. SFT has no pairs: no beyond.

    In float64, since a GPU adds in no fixed order: a float32 sum of a thousand tokens would differ from one call to the next.
    """
    sums = torch.zeros(2 * batch.num_answers, dtype=torch.float64, device=logps.device)
    return sums.index_add(0, 2 * batch.answers + batch.beyond, logps.double()).view(-1, 2)
