"""Whether a policy prefers the chosen answers of held-out pairs more than its reference does: needs no judge."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel


class Margin(NamedTuple):
    """Of one pair: log-ratios of policy to reference, in nats, summed over the answer's tokens."""

    chosen: float
    rejected: float

    @property
    def score(self) -> float:
        """Whether the chosen answer has gained more: rewards/accuracies of a DPO run."""
        return float(self.chosen > self.rejected)


def margins(policy: PreTrainedModel, reference: PreTrainedModel, rows: list[dict]) -> list[Margin]:
    """`rows`: prompt, chosen and rejected as token ids, as prepared data has them."""
    return [Margin(*(_gain(policy, reference, row["prompt"], row[name]) for name in ("chosen", "rejected"))) for row in rows]


def _gain(policy: PreTrainedModel, reference: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    return answer_logp(policy, prompt, answer) - answer_logp(reference, prompt, answer)


@torch.inference_mode()
def answer_logp(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """Sum of the answer tokens' log-probs after the prompt, in float32."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, -len(answer) :, None]).sum().item()
