"""A few short rows on which a model's packed forward pass is compared with transformers' own, which reads them one at a time."""

from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from posttrain.data.packing import MicroBatch, RowBuilder
from posttrain.operators.positions import longest_position, same_frequencies_until

CPU = torch.device("cpu")


class SampleRow(NamedTuple):
    """A row of a few tokens at the end of a text of `length` tokens: as cheap as a short one, and its positions are those of a long one."""

    ids: torch.Tensor  # (tokens,)
    length: int

    @property
    def positions(self) -> torch.Tensor:
        """The position of each token, (tokens,)."""
        return torch.arange(self.length - len(self.ids), self.length)


def sample_rows(config) -> list[SampleRow]:
    """Return the rows, the shortest first; where rotary frequencies depend on the row also some as long as the first ones last, and longer.

    In this order transformers' `dynamic` (5.23), which keeps the frequencies of the longest row so far, has those of each row.
    """
    most, end = longest_position(config) or 13, same_frequencies_until(config)
    lengths = [(n, n) for n in (min(5, most), min(8, most), min(13, most))]
    if end:
        lengths += [(min(7, end), end), (6, end + 6), (9, 2 * end + 9)]
    return [SampleRow(torch.arange(count) * 7919 % config.vocab_size, length) for count, length in lengths]


def plain_logps(model: PreTrainedModel, row: SampleRow, device: torch.device = CPU) -> torch.Tensor:
    """Return the log-probs of row.ids[1:], (tokens - 1,) in float32 on the CPU, by transformers' own forward pass, without packing.

    `device` is the one on which the model computes.
    """
    ids = row.ids
    given = {} if row.length == len(ids) else {"position_ids": row.positions[None].to(device)}
    logits = model(input_ids=ids[None].to(device), use_cache=False, **given).logits[0, :-1].float().cpu()
    return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def packed_rows(rows: list[SampleRow]) -> MicroBatch:
    """Return the micro-batch of all rows, in this order, every token but a row's first being a target."""
    builder = RowBuilder()
    for row in rows:
        builder.add_sequence(row.ids, row.ids)
    batch = builder.build()
    packing = replace(batch.packing, lengths=torch.tensor([row.length for row in rows]))
    return batch._replace(position_ids=torch.cat([row.positions for row in rows])[None], packing=packing)
