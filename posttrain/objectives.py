"""What is minimised: from a micro-batch's log-probs to its share of the step's loss, and the sums that become metrics.

SFT divides by the step's trained tokens, DPO by its pairs, always the totals of the whole step over all ranks. Metrics travel as
sums, are reduced over ranks once a step, and carry TRL's names.
"""

from collections.abc import Callable

import torch

from posttrain.config import DPORecipe
from posttrain.data import MicroBatch, Split
from posttrain.losses import PairLogps, dpo_loss, rewards

LogProbs = Callable[[MicroBatch], torch.Tensor]  # an engine: micro-batch -> (N,) float32 log-probs


class SFT:
    """Negative log-likelihood, averaged over the trained tokens of a step."""

    sums = ("nll",)

    def __init__(self, policy: LogProbs):
        self.policy = policy

    def totals(self, split: Split, indices) -> dict[str, int]:
        return {"tokens": int(split.trained[indices].sum())}

    def loss(self, batch: MicroBatch, totals: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """This micro-batch's share of the step's loss, and the detached sums named in `sums`."""
        nll = -self.policy(batch).sum()
        return nll / totals["tokens"], nll.detach()[None]

    def metrics(self, sums: dict[str, float], totals: dict[str, int]) -> dict[str, float]:
        return {"loss": sums["nll"] / totals["tokens"]}


class DPO:
    """Direct Preference Optimization, averaged over the pairs of a step, plus an optional NLL of the chosen answers per token."""

    sums = ("loss", "nll", "accuracies", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected")

    def __init__(self, policy: LogProbs, reference: LogProbs | None, recipe: DPORecipe):
        self.policy, self.reference = policy, reference
        self.beta, self.label_smoothing, self.nll_weight = recipe.beta, recipe.label_smoothing, recipe.chosen_nll_weight

    def totals(self, split: Split, indices) -> dict[str, int]:
        return {"pairs": len(indices), "tokens": int(split.trained[indices].sum())}

    def loss(self, batch: MicroBatch, totals: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As SFT.loss. With a reference, every rank must call this equally often: its ZeRO-3 gathers are collective."""
        policy = pair_logps(self.policy(batch), batch)
        reference = self.reference_logps(batch)
        losses = dpo_loss(policy, reference, self.beta, self.label_smoothing)
        nll = -policy.chosen.sum()
        share = losses.sum() / totals["pairs"] + self.nll_weight * nll / totals["tokens"]
        with torch.no_grad():
            reward = rewards(policy, reference, self.beta)
            accurate = (reward.chosen > reward.rejected).float()  # a tie counts as wrong, as in TRL
            columns = (losses, accurate, reward.chosen, reward.rejected, policy.chosen, policy.rejected)
            loss_sum, *others = (column.sum() for column in columns)
            return share, torch.stack([loss_sum, nll, *others])

    @torch.no_grad()
    def reference_logps(self, batch: MicroBatch) -> PairLogps:
        if self.reference is None:  # reference-free: a uniform reference cancels out
            zeros = torch.zeros(batch.num_answers // 2, device=batch.rows.device)
            return PairLogps(zeros, zeros)
        return pair_logps(self.reference(batch), batch)

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
            "nll_loss": nll,
            "dpo_loss": mean["loss"],
        }


def pair_logps(logps: torch.Tensor, batch: MicroBatch) -> PairLogps:
    """(N,) token log-probs -> sums over the answers, which alternate chosen, rejected."""
    sums = torch.zeros(batch.num_answers, device=logps.device).index_add(0, batch.answers, logps)
    return PairLogps(sums[0::2], sums[1::2])
