"""What a run takes of each rank's memory, known before it runs.

Weights, gradients and optimizer states follow from the number of parameters, the ranks and the ZeRO stage, as DeepSpeed 0.19.8 keeps them.
Activations are counted: the model's own code runs, forward and backward, on tensors that have shapes and no values, with one decoder layer
and with two, and every storage is counted while it lives. The difference is a layer's.
"""

from dataclasses import dataclass

import torch


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
            offload_optimizer=_is_off(section.get("offload_optimizer")),
            offload_parameters=_is_off(section.get("offload_param")),
        )


def _is_off(section: dict | None) -> bool:
    return bool(section) and section.get("device", "none") != "none"


ONE_BUCKET = 500_000_000  # elements; DeepSpeed 0.19.8's ZeRO-1 in bfloat16 begins a new one after a tensor, and all matrices are one


def predict(
    largest: tuple[float, float],
    usual: tuple[float, float],
    count: int,
    piece: int,
    zero: Zero,
    ranks: int,
    dtype: torch.dtype,
    reference: bool,
    on_gpu: bool,
) -> Parts:
    """What a rank takes at most, training a model of `count` parameters, of which an embedding and a layer have `piece`.

    `largest` and `usual`: count_working of the run's largest micro-batch, which goes first, while no gradients are there yet, and of the
    largest of its steps, which in step 1 come after it.
    """
    size, share = dtype.itemsize, count / ranks
    gathered = size * min(count, zero.live_parameters + zero.prefetch)
    weights = size * (share if zero.stage == 3 else count)
    optimizer = 12 * (share if zero.stage else count)
    bucket = min(zero.reduce_bucket, count)
    # stage 1 in bfloat16 has an optimizer of its own, which keeps both kinds of gradients, from the start and from one pass to the next
    both = zero.stage == 1 and size == 2 and not zero.offload_optimizer
    buffers = 0.0
    if zero.stage and on_gpu and not both:  # on a CPU they take memory only as they are filled, when activations go
        buffers = size * zero.reduce_bucket
    # added up in float32 but at stage 0; there and at stage 1 a backward pass keeps its own until it has all of them
    gradients = size * count if zero.stage == 0 else 4 * (count if zero.stage == 1 else share)
    own = size * count if zero.stage == 1 and not both else 0.0
    if zero.stage > 1 and not on_gpu:
        own += size * bucket
    if zero.stage == 3:  # DeepSpeed 0.19.8 lays a full bucket's gradients out once more, by rank, to scatter them
        own += size * bucket
    # of activations, once the first bucket is full; or, at stages 0 and 1, all gradients are there
    left = max(usual[1], usual[0] * (1 - bucket / count)) if zero.stage > 1 else usual[1]
    flat = {0: 4 * count if size == 2 else 0.0, 1: 4 * share}.get(zero.stage, 0.0)  # of the optimizer step
    if both:  # all sums as they are sent, whatever the bucket's size, and before that, where they are few, laid out in one
        flat = (size if count > ONE_BUCKET else 4 + size) * count
    if zero.ranks_of_node > 1:
        buffers += size * count / zero.ranks_of_node
    # the first pass, in which ZeRO-3 learns the order of the layers, holds one at a time, and the embedding
    first = size * min(piece, count) if zero.stage == 3 else 0.0
    later = gathered if zero.stage == 3 else 0.0
    if zero.offload_parameters:
        weights = 0.0
    if zero.offload_optimizer:
        optimizer = 0.0
    beside = (size * share + gathered) if reference else 0.0
    # gradients and gathered layers that are there, memory that is at work, and the log-probs' part of it, in each phase
    zeroed = gradients if zero.stage == 3 or both else 0.0  # there from the start
    gradients += size * count if both else 0.0
    phases = [
        (zeroed, first, *largest),
        (gradients, later, *usual),
        (gradients, later, own + left, usual[1]),
        (gradients, 0.0, flat, 0.0),
    ]
    there, layers, working, head = max(phases, key=lambda phase: sum(phase[:3]))
    head = min(working, head)
    return Parts(weights, there, optimizer, buffers + layers, beside, working - head, head)
