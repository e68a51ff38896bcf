"""What a run takes of each rank's memory, known before it runs.

Weights, gradients and optimizer states follow from the number of parameters, the ranks and the ZeRO stage, as DeepSpeed 0.19.8 keeps them.
What forward and backward take is counted in activations.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from posttrain.engine.adam import FLOAT32, STATE_BYTES


@dataclass(frozen=True)
class Parts:
    """Bytes of one rank's memory, part by part; `total` is the most that are there at one time."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float  # of DeepSpeed: gradients on their way to other ranks; at ZeRO-3 layers that are gathered, and a node's copy
    reference: float
    activations: float
    head: float  # what the log-probs need: some logits at a time, and the gradients by hidden states and by the head's weights

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Zero:
    """What of a ds_config decides memory."""

    stage: int
    reduce_bucket: int = 500_000_000  # elements
    live_parameters: int = 1_000_000_000
    prefetch: int = 50_000_000
    reuse_distance: int = 1_000_000_000  # to the next use of a weight, in elements, within which it stays gathered
    ranks_of_node: int = 1  # that share a second copy of the weights, hpZ; 1: there is none
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, ds_config: dict) -> "Zero":
        section = ds_config.get("zero_optimization", {})
        return cls(
            stage=section.get("stage", 0),
            reduce_bucket=int(section.get("reduce_bucket_size", cls.reduce_bucket)),
            live_parameters=int(section.get("stage3_max_live_parameters", cls.live_parameters)),
            prefetch=int(section.get("stage3_prefetch_bucket_size", cls.prefetch)),
            reuse_distance=int(section.get("stage3_max_reuse_distance", cls.reuse_distance)),
            ranks_of_node=section.get("zero_hpz_partition_size", cls.ranks_of_node),
            offload_optimizer=is_offloaded(section.get("offload_optimizer")),
            offload_parameters=is_offloaded(section.get("offload_param")),
        )


def is_offloaded(section: dict | None) -> bool:
    """Whether an offload section of a ds_config names a device."""
    return bool(section) and section.get("device", "none") != "none"


ONE_BUCKET = 500_000_000  # elements; DeepSpeed 0.19.8's ZeRO-1 in bfloat16 begins a new one after a tensor, and all matrices are one


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks, and in which dtype it computes."""

    zero: Zero
    ranks: int
    dtype: torch.dtype
    on_gpu: bool

    @property
    def has_own_optimizer(self) -> bool:
        """Whether DeepSpeed takes BF16_Optimizer, which keeps gradients in both dtypes, from the start and from one pass to the next."""
        return self.zero.stage == 1 and self.dtype.itemsize == 2 and not self.zero.offload_optimizer


@dataclass(frozen=True)
class States:
    """Bytes of one rank that are there from the first step to the last."""

    weights: float
    gradients: float  # added up in float32, except at stage 0
    optimizer: float  # float32 weights and Adam's two moments


def states(count: int, layout: Layout) -> States:
    """What a rank keeps of a model of `count` parameters."""
    size, share, stage = layout.dtype.itemsize, count / layout.ranks, layout.zero.stage
    gradients = (size * count, FLOAT32 * count, FLOAT32 * share, FLOAT32 * share)[stage]
    return States(
        weights=0.0 if layout.zero.offload_parameters else size * (share if stage == 3 else count),
        gradients=gradients + (size * count if layout.has_own_optimizer else 0.0),
        optimizer=0.0 if layout.zero.offload_optimizer else STATE_BYTES * (share if stage else count),
    )


class Working(NamedTuple):
    """Bytes that forward and backward of a micro-batch take at most, and those of them that the log-probs do."""

    most: float
    head: float


def peak(count: int, piece: int, layout: Layout, largest: Working, usual: Working, has_reference: bool) -> Parts:
    """The most that a rank takes at one time, training a model of `count` parameters, of which an embedding and a layer have `piece`.

    `largest`: of the run's largest micro-batch, which goes first, while no gradients are there yet. `usual`: of the largest of its steps,
    which in step 1 come after it.
    """
    zero, kept, size = layout.zero, states(count, layout), layout.dtype.itemsize
    gathered = size * min(count, zero.live_parameters + zero.prefetch)
    # the first pass, in which ZeRO-3 learns the order of the layers, holds one at a time, and the embedding
    first, later = (size * min(piece, count), gathered) if zero.stage == 3 else (0.0, 0.0)
    there_at_start = kept.gradients if zero.stage == 3 else 4 * count if layout.has_own_optimizer else 0.0
    # of each phase: gradients and gathered layers that are there, memory that is at work, and the log-probs' part of it
    phases = [
        (there_at_start, first, largest.most, largest.head),
        (kept.gradients, later, usual.most, usual.head),
        (kept.gradients, later, _at_backwards_end(count, layout, usual), usual.head),
        (kept.gradients, 0.0, _in_the_update(count, layout), 0.0),
    ]
    gradients, layers, working, head = max(phases, key=lambda phase: sum(phase[:3]))
    head = min(working, head)
    return Parts(
        weights=kept.weights,
        gradients=gradients,
        optimizer=kept.optimizer,
        buffers=_buffers(count, layout) + layers,
        reference=size * count / layout.ranks + gathered if has_reference else 0.0,
        activations=working - head,
        head=head,
    )


def _buffers(count: int, layout: Layout) -> float:
    """DeepSpeed's buckets of gradients, and a node's copy of the weights."""
    zero, size = layout.zero, layout.dtype.itemsize
    # on a CPU buckets take memory only as they are filled, when activations go
    buckets = size * zero.reduce_bucket if zero.stage and layout.on_gpu and not layout.has_own_optimizer else 0.0
    return buckets + (size * count / zero.ranks_of_node if zero.ranks_of_node > 1 else 0.0)


def _at_backwards_end(count: int, layout: Layout, usual: Working) -> float:
    """A backward pass's own gradients, and the activations that are left then."""
    stage, size, bucket = layout.zero.stage, layout.dtype.itemsize, min(layout.zero.reduce_bucket, count)
    if stage < 2:  # stage 1 keeps its own until it has all of them
        return (size * count if stage == 1 and not layout.has_own_optimizer else 0.0) + usual.head
    # DeepSpeed 0.19.8 lays a full bucket's gradients out once more at ZeRO-3, by rank, to scatter them
    buckets = (not layout.on_gpu) + (stage == 3)
    return size * bucket * buckets + max(usual.head, usual.most * (1 - bucket / count))


def _in_the_update(count: int, layout: Layout) -> float:
    """What the optimizer step takes besides states and gradients."""
    size, stage = layout.dtype.itemsize, layout.zero.stage
    if layout.has_own_optimizer:  # all sums as they are sent, whatever the bucket's size; where they are few also laid out in one
        return (size if count > ONE_BUCKET else 4 + size) * count
    return {0: 4 * count if size == 2 else 0.0, 1: 4 * count / layout.ranks}.get(stage, 0.0)
