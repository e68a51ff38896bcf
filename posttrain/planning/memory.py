"""Predicts how much memory a run takes on each rank.

Weights, gradients and optimizer states follow from the number of parameters, the ranks and the ZeRO stage, as DeepSpeed 0.19.8 keeps them.
What forward and backward take is counted in activations.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from posttrain.engine.adam import FLOAT32, STATE_BYTES


@dataclass(frozen=True)
class Parts:
    """One rank's memory at its peak, in bytes, part by part. `total` is the peak."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float  # DeepSpeed's: gradients on their way to other ranks; at ZeRO-3 also gathered layers, and hpZ's second copy
    reference: float  # DPO's reference model, with the layers that it gathers
    activations: float
    head: float  # for the log-probs: some logits at a time, and the gradients of hidden states and of the head's weights

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Zero:
    """Those settings of a ds_config on which memory depends; defaults are DeepSpeed's."""

    stage: int
    reduce_bucket: int = 500_000_000  # elements
    live_parameters: int = 1_000_000_000  # elements
    prefetch: int = 50_000_000  # elements
    reuse_distance: int = 1_000_000_000  # a gathered weight stays gathered if its next use is at most this many elements away
    ranks_of_node: int = 1  # ranks that share a second copy of the weights (hpZ, ZeRO++); 1: there is no such copy
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, ds_config: dict) -> "Zero":
        """Read the settings from a ds_config."""
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
    """Whether a ds_config's section offload_optimizer or offload_param names a device to offload to."""
    return bool(section) and section.get("device", "none") != "none"


# elements; DeepSpeed 0.19.8's ZeRO-1 in bfloat16 begins a new bucket only after a tensor, and all matrices are one tensor
ONE_BUCKET = 500_000_000


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks, and in which dtype it computes."""

    zero: Zero
    ranks: int
    dtype: torch.dtype
    on_gpu: bool
    frozen: int = 0  # parameters that are not trained, as those that see pictures; every rank has them

    @property
    def has_own_optimizer(self) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer, which keeps all gradients in float32 from the start on."""
        return self.zero.stage == 1 and self.dtype.itemsize == 2 and not self.zero.offload_optimizer


@dataclass(frozen=True)
class States:
    """One rank's memory that is taken from the first step to the last, in bytes."""

    weights: float
    gradients: float  # added up in float32, except at stage 0
    optimizer: float  # float32 weights and Adam's two moments


def states(count: int, layout: Layout) -> States:
    """Return what each rank keeps of a model with `count` trained parameters."""
    size, share, stage = layout.dtype.itemsize, count / layout.ranks, layout.zero.stage
    weights = 0.0 if layout.zero.offload_parameters else size * (share if stage == 3 else count)
    return States(
        weights=weights + size * layout.frozen,
        gradients=(size * count, FLOAT32 * count, FLOAT32 * share, FLOAT32 * share)[stage],
        optimizer=0.0 if layout.zero.offload_optimizer else STATE_BYTES * (share if stage else count),
    )


def bytes_on_host(count: int, layout: Layout) -> float:
    """Return what each rank keeps in its host's memory of a model with `count` parameters: offloaded states, gradients and weights."""
    share, zero = count / layout.ranks, layout.zero
    optimizer = (STATE_BYTES + FLOAT32) * share if zero.offload_optimizer else 0.0  # gradients are added up there, in float32
    return optimizer + (layout.dtype.itemsize * share if zero.offload_parameters else 0.0)


class Working(NamedTuple):
    """Bytes that forward and backward of a micro-batch take at their peak, and how many of them are for the log-probs."""

    most: float
    head: float


def peak(count: int, piece: int, layout: Layout, largest: Working, usual: Working, has_reference: bool) -> Parts:
    """Return the memory of a rank at its peak, in the phase of a step that takes the most.

    The model has `count` parameters, its embedding and one layer together have `piece`. `largest` is what the run's largest micro-batch
    takes, which is tried before step 1, while there are no gradients yet; `usual` is what the largest micro-batch of the steps takes.
    """
    zero, kept, size = layout.zero, states(count, layout), layout.dtype.itemsize
    gathered = size * min(count, zero.live_parameters + zero.prefetch)
    # in the first pass, in which ZeRO-3 learns the order of the layers, it gathers one layer at a time, and the embedding
    first, later = (size * min(piece, count), gathered) if zero.stage == 3 else (0.0, 0.0)
    there_at_start = kept.gradients if zero.stage == 3 or layout.has_own_optimizer else 0.0
    # each phase: gradients, gathered layers, memory for computing, and the log-probs' part of that
    phases = [
        (there_at_start, first, largest.most, largest.head),
        (kept.gradients, later, usual.most, usual.head),
        (kept.gradients, later, _bytes_at_end_of_backward(count, layout, usual), usual.head),
        (kept.gradients, 0.0, _bytes_in_update(count, layout), 0.0),
    ]
    gradients, layers, working, head = max(phases, key=lambda phase: sum(phase[:3]))
    head = min(working, head)
    return Parts(
        weights=kept.weights,
        gradients=gradients,
        optimizer=kept.optimizer,
        buffers=_buffer_bytes(count, layout) + layers,
        reference=size * (count / layout.ranks + layout.frozen) + gathered if has_reference else 0.0,
        activations=working - head,
        head=head,
    )


def _buffer_bytes(count: int, layout: Layout) -> float:
    """Return the bytes of DeepSpeed's gradient buckets and of hpZ's second copy of the weights."""
    zero, size = layout.zero, layout.dtype.itemsize
    # on a CPU a bucket takes memory only as it is filled, while activations are freed
    buckets = size * zero.reduce_bucket if zero.stage and layout.on_gpu and not layout.has_own_optimizer else 0.0
    return buckets + (size * count / zero.ranks_of_node if zero.ranks_of_node > 1 else 0.0)


def _bytes_at_end_of_backward(count: int, layout: Layout, usual: Working) -> float:
    """Return the bytes of the gradients that a backward pass has made and not yet added up, and of the activations that are left then."""
    stage, size, bucket = layout.zero.stage, layout.dtype.itemsize, min(layout.zero.reduce_bucket, count)
    if stage < 2:  # stage 1 keeps the pass's gradients until it has all of them
        return (size * count if stage == 1 and not layout.has_own_optimizer else 0.0) + usual.head
    # at ZeRO-3 DeepSpeed 0.19.8 copies a full bucket's gradients once more, in the order of ranks, to scatter them
    buckets = (not layout.on_gpu) + (stage == 3)
    return size * bucket * buckets + max(usual.head, usual.most * (1 - bucket / count))


def _bytes_in_update(count: int, layout: Layout) -> float:
    """Return the bytes that the optimizer step takes beside states and gradients."""
    size, stage = layout.dtype.itemsize, layout.zero.stage
    if layout.has_own_optimizer:  # all summed gradients as they are sent, whatever the bucket's size; a small model's also in one piece
        return (size if count > ONE_BUCKET else 4 + size) * count
    return {0: 4 * count if size == 2 else 0.0, 1: 4 * count / layout.ranks}.get(stage, 0.0)
