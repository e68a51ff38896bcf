"""SFT's objective: the negative log-likelihood of the trained tokens.

An objective turns a micro-batch's log-probs into its share of the step's loss, and into sums that become metrics. SFT divides by trained
tokens, DPO by pairs, always those of the whole step over all ranks. The sums are added up over ranks once a step; metrics have TRL's names
where TRL has them.
"""

import torch

from posttrain.data.packing import MicroBatch
from posttrain.data.prepared import Split
from posttrain.objectives.answers import Examples, LogProbs, Sums, add_examples, answer_sums


class SFT:
    """Negative log-likelihood, averaged over the trained tokens of a step."""

    def __init__(self, policy: LogProbs):
        self.policy = policy

    def totals(self, split: Split, indices) -> dict[str, int]:
        """Return what the loss of a step with these examples is divided by, over all ranks."""
        return {"tokens": int(split.trained[indices].sum())}

    def loss(self, batch: MicroBatch, totals: dict[str, int], examples: Examples | None = None) -> tuple[torch.Tensor, Sums]:
        """Return this micro-batch's share of the step's loss, a scalar with a gradient, and the sums from which `metrics` is computed.

        `totals` are the whole step's. Where `examples` is given, each example's mean NLL and trained tokens are appended to it.
        """
        logps = self.policy(batch)
        if examples is not None:
            lengths = batch.answer_lengths
            add_examples(examples, {"nll": -answer_sums(logps, batch).sum(1) / lengths.clamp(min=1), "answer_tokens": lengths})
        nll = -logps.sum()
        return nll / totals["tokens"], {"nll": nll.detach()}

    def metrics(self, sums: dict[str, float], totals: dict[str, int]) -> dict[str, float]:
        """Return a step's metrics, from the sums of all its micro-batches on all ranks."""
        return {"loss": sums["nll"] / totals["tokens"]}

    def example_losses(self, batch: MicroBatch) -> torch.Tensor:
        """Return the mean token loss of each example of the micro-batch, (examples,)."""
        lengths = batch.answer_lengths.clamp(min=1)
        return -answer_sums(self.policy(batch), batch).sum(1) / lengths
