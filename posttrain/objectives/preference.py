"""DPO and its relatives: a preference loss over pairs of answers, with metrics named as TRL names them."""

import torch

from posttrain.data.packing import MicroBatch
from posttrain.data.prepared import Split
from posttrain.objectives.answers import Examples, LogProbs, Sums, add_examples, answer_lengths, answer_sums
from posttrain.objectives.losses import LOSSES, PairLogps, rewards


class DPO:
    """A preference loss, averaged over the pairs of a step, plus an optional NLL of the chosen answers per token."""

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
        """`reference`: the engine beside the policy; None where the loss has none, or the data brings its log-probs.

        `loss` is one of LOSSES; the others are the recipe's keys of the same names.
        """
        self.policy, self.reference = policy, reference
        self.preference_loss = LOSSES[loss]
        self.has_reference = "reference" in self.preference_loss.reads and not reference_free
        self.beta, self.ld_alpha, self.nll_weight = beta, ld_alpha, chosen_nll_weight
        self.options = {"beta": beta, "label_smoothing": label_smoothing, "simpo_gamma": simpo_gamma}

    @property
    def loss_at_start(self) -> float:
        """The preference loss where policy and reference agree."""
        return self.preference_loss.at_start(**{name: value for name, value in self.options.items() if name in self.preference_loss.reads})

    def totals(self, split: Split, indices) -> dict[str, int]:
        return {"pairs": len(indices), "tokens": int(split.trained[indices].sum())}

    def loss(self, batch: MicroBatch, totals: dict[str, int], examples: Examples | None = None) -> tuple[torch.Tensor, Sums]:
        """Return this micro-batch's share of the step's loss, and the sums that `metrics` takes; see SFT.loss.

        With a reference beside, every rank must call this equally often: its ZeRO-3 gathers are collective.
        """
        sums, lengths = answer_sums(self.policy(batch), batch), answer_lengths(batch)
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
                "logps/accuracies": (means[0::2] > means[1::2]).double(),  # whether the policy finds the chosen answer likelier, per token
            }
            return share, {"nll": nll.detach(), **{name: values.detach().sum() for name, values in of_pairs.items()}}

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
        """A step's metrics, from the sums of all its micro-batches."""
        nll = sums["nll"] / totals["tokens"]
        mean = {name: value / totals["pairs"] for name, value in sums.items() if name != "nll"}
        margins = mean["rewards/chosen"] - mean["rewards/rejected"]
        return {"loss": mean["preference_loss"] + self.nll_weight * nll, **mean, "rewards/margins": margins, "nll_loss": nll}

    def example_losses(self, batch: MicroBatch) -> torch.Tensor:
        """The preference loss of each pair of the micro-batch. As `loss`, a collective with a reference beside."""
        policy = self.pairs(answer_sums(self.policy(batch), batch))
        return self.preference_losses(policy, self.reference_logps(batch), answer_lengths(batch))

    def preference_losses(self, policy: PairLogps, reference: PairLogps | None, lengths: torch.Tensor) -> torch.Tensor:
        """(P,) losses of P pairs; lengths (2 P,) as answer_lengths gives them."""
        return self.preference_loss(policy, reference, PairLogps(lengths[0::2], lengths[1::2]), self.options)
