"""Measures, without a judge, whether a policy prefers the chosen answers of held-out pairs more than its reference does."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel


class Margin(NamedTuple):
    """The log-ratios of policy to reference for the two answers of a pair, in nats, summed over each answer's tokens."""

    chosen: float
    rejected: float

    @property
    def score(self) -> float:
        """1 where the chosen answer has gained more, else 0; its mean is rewards/accuracies of a DPO run."""
        return float(self.chosen > self.rejected)


def margins(policy: PreTrainedModel, reference: PreTrainedModel, rows: list[dict]) -> list[Margin]:
    """Return the margin of each row; a row has prompt, chosen and rejected as token ids, as in prepared data."""
    return [Margin(*(_gain(policy, reference, row["prompt"], row[name]) for name in ("chosen", "rejected"))) for row in rows]


def _gain(policy: PreTrainedModel, reference: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    return answer_logp(policy, prompt, answer) - answer_logp(reference, prompt, answer)


@torch.inference_mode()
def answer_logp(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """Return the sum of the answer tokens' log-probs after the prompt, in nats, computed in float32."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, -len(answer) :, None]).sum().item()
