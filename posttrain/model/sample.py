"""A fixed sample of tokens, by whose log-probs two copies of a model are compared."""

import torch
from transformers import PreTrainedModel

from posttrain.data.packing import MicroBatch, RowBuilder

LENGTHS = (5, 13, 8)  # tokens


def rows(vocabulary: int) -> list[torch.Tensor]:
    """Return the ids of each row of the sample, (tokens,) each, for a vocabulary of this size."""
    return [torch.arange(length) * 7919 % vocabulary for length in LENGTHS]


def packed(vocabulary: int) -> MicroBatch:
    """Return the sample's rows as one micro-batch."""
    builder = RowBuilder()
    for ids in rows(vocabulary):
        builder.add_sequence(ids.tolist(), ids.tolist())
    return builder.build()


@torch.no_grad()
def plain_logps(model: PreTrainedModel) -> torch.Tensor:
    """Return the log-probs of the sample's tokens but each row's first, (N,) in float32 on the CPU, by transformers' own forward pass."""
    device, found = next(model.parameters()).device, []
    for ids in rows(model.config.vocab_size):
        logits = model(input_ids=ids[None].to(device)).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None].to(device)).squeeze(1))
    return torch.cat(found).cpu()
