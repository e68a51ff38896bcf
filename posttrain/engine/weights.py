"""Weights of an engine, whole although they are sharded: gathered for the result, sampled for the share that a step changes."""

import math

import deepspeed
import torch
from torch import distributed as dist

from posttrain.operators.saved_form import as_saved


class WeightSample:
    """A fixed sample of this rank's weights: which share of them changes in a step?

    Float32 master weights keep every update, however small; the bfloat16 copies that compute change only where it crosses a rounding
    step, which is about 1/256 of a weight's size.
    """

    TENSORS, ELEMENTS = 16, 2**14

    def __init__(self, engine):
        tensors = [getattr(p, "ds_tensor", p) for p in engine.module.parameters() if p.ndim >= 2 or hasattr(p, "ds_tensor")]
        tensors = [tensor for tensor in tensors if tensor.numel() > 1]  # one that lies on an NVMe has 1
        self.tensors = tensors[:: max(1, math.ceil(len(tensors) / self.TENSORS))]
        self.device = engine.device

    def values(self) -> list[torch.Tensor]:
        flat = [tensor.detach().flatten() for tensor in self.tensors]
        return [values[:: max(1, len(values) // self.ELEMENTS)].clone() for values in flat]

    def share_changed(self, before: list[torch.Tensor]) -> float:
        """Share of the sample, over all ranks, that differs from `before`. All ranks."""
        now = self.values()
        changed = sum((a != b).sum() for a, b in zip(before, now, strict=True))
        counts = torch.tensor([float(changed), sum(map(len, now))], device=self.device)
        dist.all_reduce(counts)
        return (counts[0] / counts[1]).item()


def gathered_state_dict(engine) -> dict[str, torch.Tensor] | None:
    """The wrapped model's weights by name, on the CPU of rank 0 (None elsewhere), one tensor gathered at a time. All ranks."""
    state = {}
    for name, parameter in engine.module.model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            if dist.get_rank() == 0:
                state[name] = as_saved(name, parameter.detach(), engine.module.model.config).to("cpu", copy=True)
    return state if dist.get_rank() == 0 else None
