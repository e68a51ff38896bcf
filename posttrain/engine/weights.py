"""Reads an engine's weights, sharded or not: gathers them for the result, and samples them for the share that a step changes."""

import math

import deepspeed
import torch
from torch import distributed as dist

from posttrain.operators.saved_form import as_saved, persistent_buffers


class WeightSample:
    """A fixed sample of this rank's weights, to measure which share of them a step changes.

    Float32 master weights keep every update, however small; a bfloat16 copy, which computes, changes only if the update crosses
    a rounding step, about 1/256 of the weight's size.
    """

    TENSORS, ELEMENTS = 16, 2**14

    def __init__(self, engine):
        tensors = [getattr(p, "ds_tensor", p) for p in engine.module.parameters() if p.ndim >= 2 or hasattr(p, "ds_tensor")]
        tensors = [tensor for tensor in tensors if tensor.numel() > 1]  # a tensor offloaded to NVMe has 1
        self.tensors = tensors[:: max(1, math.ceil(len(tensors) / self.TENSORS))]
        self.device = engine.device

    def values(self) -> list[torch.Tensor]:
        """Returns copies of the sampled weights, at most about twice ELEMENTS from each of at most TENSORS tensors."""
        flat = [tensor.detach().flatten() for tensor in self.tensors]
        return [values[:: max(1, len(values) // self.ELEMENTS)].clone() for values in flat]

    def share_changed(self, before: list[torch.Tensor]) -> float:
        """Returns the share of the sample, of all ranks together, that differs from `before`, earlier `values`. All ranks."""
        now = self.values()
        # the device is not asked for a value before the sum; offloaded weights are elsewhere
        changed = torch.stack([(a != b).sum().to(self.device) for a, b in zip(before, now, strict=True)]).sum().float()
        counts = torch.stack([changed, changed.new_full((), sum(map(len, now)))])
        dist.all_reduce(counts)
        return (counts[0] / counts[1]).item()


def gathered_state_dict(engine) -> dict[str, torch.Tensor] | None:
    """Gather what the model is saved as, one tensor at a time: parameters, of tied ones the first name, and persistent buffers.

    Returns name -> tensor on the CPU on rank 0, None on other ranks. All ranks.
    """
    state = {}
    for name, parameter in engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            if dist.get_rank() == 0:
                state[name] = as_saved(name, parameter.detach(), engine.module.model.config).to("cpu", copy=True)
    if dist.get_rank():
        return None
    return state | {name: buffer.to("cpu", copy=True) for name, buffer in persistent_buffers(engine.module.model).items()}
