"""DPO's objective: a preference loss over pairs of answers, with TRL's names for metrics. likelihood.py says what an objective is."""

import torch

from posttrain.data.packing import MicroBatch
from posttrain.data.prepared import Split
from posttrain.objectives.answers import Examples, LogProbs, Sums, add_examples, answer_sums
from posttrain.objectives.losses import LOSSES, PairLogps, rewards


class DPO:
    """A preference loss averaged over a step's pairs, plus, with chosen_nll_weight, the NLL of the chosen answers per token."""

    def __init__(
        self,
        policy: LogProbs,
        reference: LogProbs | None,
        *,
        loss: str,
        beta: float,
        label_smoothing: float = 0.0,
        simpo_gamma: float = 0.0,
        ld_alpha: float = 1.0,
        chosen_nll_weight: float = 0.0,
        reference_free: bool = False,
    ):
        """Take the policy's and the reference's engine; `loss` is a name in LOSSES, the other arguments are the recipe's keys.

        `reference` is None where the loss has none, or where its log-probs were precomputed and come with the data.
        """
        self.policy, self.reference = policy, reference
        self.preference_loss = LOSSES[loss]
        self.has_reference = "reference" in self.preference_loss.reads and not reference_free
        self.beta, self.ld_alpha, self.nll_weight = beta, ld_alpha, chosen_nll_weight
        self.options = {"beta": beta, "label_smoothing": label_smoothing, "simpo_gamma": simpo_gamma}

    @property
    def loss_at_start(self) -> float:
        """The preference loss of a pair on which policy and reference agree, as they do before step 1."""
        return self.preference_loss.at_start(**{name: value for name, value in self.options.items() if name in self.preference_loss.reads})

    def totals(self, split: Split, indices) -> dict[str, int]:
        """Return what the two losses of a step with these examples are divided by, over all ranks."""
        return {"pairs": len(indices), "tokens": int(split.trained[indices].sum())}

    def loss(self, batch: MicroBatch, totals: dict[str, int], examples: Examples | None = None) -> tuple[torch.Tensor, Sums]:
        """Return this micro-batch's share of the step's loss, and the sums from which `metrics` is computed; see SFT.loss.

        With a reference engine all ranks must call this equally often, since its ZeRO-3 gathers are collective.
        """
        sums, lengths = answer_sums(self.policy(batch), batch), batch.answer_lengths
        policy, reference = self.pairs(sums), self.reference_logps(batch)
        losses = self.preference_losses(policy, reference, lengths)
        nll = -sums[0::2].sum()
        share = (losses.sum() / totals["pairs"] + self.nll_weight * nll / totals["tokens"]).float()
        with torch.no_grad():
            reward = rewards(policy, reference, PairLogps(lengths[0::2], lengths[1::2]), self.beta)
            means = sums.sum(1) / lengths.clamp(min=1)
            if examples is not None:
                margins = reward.chosen - reward.rejected
                add_examples(examples, {"rewards/chosen": reward.chosen, "rewards/rejected": reward.rejected, "rewards/margins": margins})
                add_examples(examples, {"chosen_tokens": lengths[0::2], "rejected_tokens": lengths[1::2]})
            of_pairs = {
                "preference_loss": losses,
                "rewards/chosen": reward.chosen,
                "rewards/rejected": reward.rejected,
                "rewards/accuracies": (reward.chosen > reward.rejected).double(),  # a tie counts as wrong, as in TRL
                "logps/chosen": policy.chosen,
                "logps/rejected": policy.rejected,
                "logps/accuracies": (means[0::2] > means[1::2]).double(),  # whether the chosen answer is likelier per token
            }
            return share, {"nll": nll.detach(), **{name: values.detach().sum() for name, values in of_pairs.items()}}

    @torch.no_grad()
    def reference_logps(self, batch: MicroBatch) -> PairLogps | None:
        """Return the reference's log-probs: zeros with reference_free, None where the loss has no reference."""
        if "reference" not in self.preference_loss.reads:
            return None
        if not self.has_reference:
            zeros = torch.zeros(batch.num_answers // 2, dtype=torch.float64, device=batch.rows.device)
            return PairLogps(zeros, zeros)
        if self.reference is None:
            return self.pairs(batch.reference_sums)
        return self.pairs(answer_sums(self.reference(batch), batch))

    def pairs(self, sums: torch.Tensor) -> PairLogps:
        """Turn answer_sums (A, 2) into log-probs of pairs; the longer answer's tail counts ld_alpha times (LD-DPO, arXiv:2409.06411)."""
        logps = sums[:, 0] + self.ld_alpha * sums[:, 1]
        return PairLogps(logps[0::2], logps[1::2])

    def metrics(self, sums: dict[str, float], totals: dict[str, int]) -> dict[str, float]:
        """Return a step's metrics, from the sums of all its micro-batches on all ranks."""
        nll = sums["nll"] / totals["tokens"]
        mean = {name: value / totals["pairs"] for name, value in sums.items() if name != "nll"}
        margins = mean["rewards/chosen"] - mean["rewards/rejected"]
        return {"loss": mean["preference_loss"] + self.nll_weight * nll, **mean, "rewards/margins": margins, "nll_loss": nll}

    def example_losses(self, batch: MicroBatch) -> torch.Tensor:
        """Return the preference loss of each pair of the micro-batch, (P,). With a reference engine all ranks must call it, as `loss`."""
        policy = self.pairs(answer_sums(self.policy(batch), batch))
        return self.preference_losses(policy, self.reference_logps(batch), batch.answer_lengths)

    def preference_losses(self, policy: PairLogps, reference: PairLogps | None, lengths: torch.Tensor) -> torch.Tensor:
        """Return the preference loss of each pair, (P,); `lengths` (2 P,) are MicroBatch.answer_lengths."""
        return self.preference_loss(policy, reference, PairLogps(lengths[0::2], lengths[1::2]), self.options)
