"""Estimates the memory and time of each way to run a recipe: plan.py prints them, max_tokens_per_gpu: auto starts from them."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from posttrain.data import batches
from posttrain.engine.ds_config import REFERENCE, read_ds_config
from posttrain.operators.heads import heads_of
from posttrain.operators.layers import ARCHITECTURES
from posttrain.operators.logprob import PLAIN, way_on_gpu
from posttrain.planning.activations import architecture_of, count_working, possible_ways
from posttrain.planning.machines import FRAGMENTS, KEPT_BACK, OF_HOST, Device
from posttrain.planning.memory import Layout, Parts, Working, Zero, bytes_on_host, peak
from posttrain.planning.work import read_model_shape, read_work
from posttrain.recipes.keys import AUTO, DPORecipe, Recipe

# Share of its peak FLOP/s that one H200 reached in SFT of 1.7B parameters (benchmarks/results/phases_gpu.json, sft_gpu.json with --compile)
REACHED, REACHED_COMPILED = 0.41, 0.446
CHECKPOINTING = ("none", "selective", "full")
STAGES = tuple(f"ds_configs/{name}.json" for name in ("zero0", "zero1", "zero2", "zero3", "zero3_offload"))
# of no use but to compare with: what it saves in sending it takes in memory, and in bfloat16 it adds up gradients less exactly
ZERO0, OFFLOAD = STAGES[0], STAGES[-1]
ZEROPP = "ds_configs/zeropp.json"  # for several nodes
STEP = 64  # small micro-batches, and lengths that rows would have to be cut to, are multiples of so many tokens
MANY = 16_384  # tokens; larger micro-batches are extrapolated from ones of this size and twice it


class Way(NamedTuple):
    """A way to run a recipe."""

    ds_config: str  # its path
    checkpointing: str  # as the recipe's activation_checkpointing


OFFLOADED = Way(OFFLOAD, "full")  # as it is slow, only with the checkpointing that leaves the least on the device


@dataclass(frozen=True)
class Seconds:
    """Seconds that timing.py measured on this machine: `token` by activation checkpointing, the others by the path of the ds_config."""

    token: dict[str, float]  # forward and backward of one token, and the reference's forward
    micro_batch: dict[str, float]  # what a micro-batch takes beside its tokens: sending gradients and gathering weights
    update: dict[str, float]  # the optimizer step


@dataclass(frozen=True)
class Estimate:
    """What one way to run a recipe takes: memory, and time per optimizer step."""

    way: Way
    parts: Parts  # memory with micro-batches of `tokens`
    tokens: int
    most_tokens: int  # the largest micro-batch that fits; 0: none does
    step_seconds: float
    sent: float  # bytes that a GPU sends in a step


class Planner:
    """Estimates a recipe's memory and time on `nodes` nodes of `gpus` devices each.

    Times come from `seconds`, what timing.py measured on this machine; where that is None, from the device's peak FLOP/s.
    """

    def __init__(self, recipe: Recipe, device: Device, gpus: int, nodes: int, assumed: str | None = None):
        """Read the model's shape and the examples' lengths; `assumed` names one of SHAPES for a model that is not there yet.

        Raises ValueError where the longest example has more tokens than the recipe's max_tokens_per_gpu.
        """
        if recipe.max_tokens_per_gpu == AUTO:
            recipe = recipe.model_copy(update={"max_tokens_per_gpu": 2**31})
        self.recipe, self.device, self.nodes, self.ranks = recipe, device, nodes, gpus * nodes
        self.on_gpu = device.name != "CPU"
        self.dtype = getattr(torch, recipe.dtype)
        self.counted, self.count, self.frozen, self.model_summary = read_model_shape(recipe, assumed)
        self.config = self.counted.get_text_config()
        self.weights = self.dtype.itemsize * (self.count + self.frozen)  # bytes
        embedding = self.config.vocab_size * self.config.hidden_size
        self.embedding, self.tied = embedding, getattr(self.config, "tie_word_embeddings", False)
        self.piece = embedding + (self.count - embedding) // self.config.num_hidden_layers
        self.work, self.work_summary = read_work(recipe)
        self.reference = isinstance(recipe, DPORecipe) and recipe.needs_reference and recipe.reference == "beside"
        self.batch = recipe.global_batch_size or (recipe.batch_size or 1) * (recipe.gradient_accumulation_steps or 1) * self.ranks
        self.steps = recipe.max_iters or math.ceil(recipe.epochs * batches.steps_per_epoch(self.work.count, self.batch))
        self.longest, most = int(self.work.lengths.max()), batches.most_of_a_rank(self.work.lengths, self.batch, self.ranks)
        self.tokens = min(recipe.max_tokens_per_gpu, most) if recipe.packing else self.longest  # of the recipe's largest micro-batch
        if self.longest > recipe.max_tokens_per_gpu:
            raise ValueError(f"the longest example has {self.longest:,} tokens, more than max_tokens_per_gpu={recipe.max_tokens_per_gpu:,}")
        self.usable = device.memory * (1 - FRAGMENTS) - KEPT_BACK
        self.fused = self.on_gpu and recipe.kernels == "auto" and (recipe.compile or architecture_of(self.counted) in ARCHITECTURES)
        self.head = way_on_gpu(device.memory, self.weights) if self.on_gpu and recipe.kernels == "auto" else PLAIN
        self.host = math.inf  # bytes that a node's ranks may keep in its memory
        self.usual_tokens = int(self.work.lengths[self.micro_batches()[0]].sum())
        self.seconds: Seconds | None = None

    def ways(self) -> list[Way]:
        """Return the ways to run that there are for this model on these devices, the preferred first; zero0 only to compare with."""
        node = Zero.of(read_ds_config(ZEROPP)).ranks_of_node
        stages = [*STAGES, *[ZEROPP] * (self.nodes > 1 and self.ranks == self.nodes * node)]
        found = [Way(stage, mode) for stage in stages for mode in possible_ways(self.counted, CHECKPOINTING)]
        return [way for way in found if way.ds_config != OFFLOAD or (self.on_gpu and way == OFFLOADED)]  # a CPU has nothing to offload from

    def parts(self, way: Way, tokens: int, ranks: int | None = None) -> Parts:
        """Estimate a rank's memory with micro-batches of at most `tokens` tokens, on the planner's ranks or on so many others."""
        largest, usual = (self.working(most, way.checkpointing) for most in (tokens, min(tokens, self.usual_tokens)))
        return peak(self.count, self.piece, self._layout(way, ranks or self.ranks), largest, usual, self.reference)

    def _layout(self, way: Way, ranks: int) -> Layout:
        return Layout(Zero.of(read_ds_config(way.ds_config)), ranks, self.dtype, self.on_gpu, self.frozen)

    def on_host(self, way: Way, ranks: int | None = None) -> float:
        """Return the bytes that a node's ranks, some of the planner's ranks or of so many others, keep in its memory: what is offloaded."""
        return bytes_on_host(self.count, self._layout(way, ranks or self.ranks)) * self.ranks / self.nodes

    def holds(self, way: Way, tokens: int, ranks: int | None = None) -> bool:
        """Whether micro-batches of `tokens` tokens fit into each rank's memory, and what is offloaded into the nodes'."""
        return self.parts(way, tokens, ranks).total <= self.usable and self.room_on_host(way, ranks) <= self.host

    def room_on_host(self, way: Way, ranks: int | None = None) -> float:
        """Return the bytes that a node's memory must have for what is offloaded, and beside it for the model that rank 0 reads into it."""
        kept = self.on_host(way, ranks)
        return kept + self.weights if kept else 0.0

    def working(self, tokens: int, checkpointing: str) -> Working:
        """Return what forward and backward of `tokens` tokens take: counted up to MANY tokens, beyond extrapolated in a straight line."""
        counted = [self._counted(min(tokens, MANY), checkpointing)]
        if tokens > MANY:
            counted.append(self._counted(2 * MANY, checkpointing))
            return Working(*(few + (many - few) * (tokens - MANY) / MANY for few, many in zip(*counted, strict=True)))
        return counted[0]

    @cache  # noqa: B019 - there is one planner
    def _counted(self, tokens: int, checkpointing: str) -> Working:
        batch = self.work.micro_batch(tokens)
        return count_working(self.counted, batch, self.dtype, checkpointing, self.fused, self.head, on_gpu=self.on_gpu)

    def most_tokens(self, way: Way) -> int:
        """Return the tokens of the largest micro-batch that fits, a multiple of 1,024 or, if it is smaller, of STEP.

        It is at least the longest example; 0 where that does not fit.
        """
        if not self.holds(way, self.longest):
            return 0
        fits = bisect.bisect_left(range(1, 2048), True, key=lambda n: not self.holds(way, 1024 * n)) * 1024
        if not fits:
            fits = bisect.bisect_left(range(1, 1024 // STEP), True, key=lambda n: not self.holds(way, STEP * n)) * STEP
        return max(fits, self.longest)

    def estimate(self, way: Way) -> Estimate:
        """Estimate memory and time of a way to run."""
        most = self.most_tokens(way)
        used = min(self.tokens, most) if most else self.tokens
        seconds, sent = self.step(way, used)
        return Estimate(way, self.parts(way, self.tokens), self.tokens, most, seconds, sent)

    def best(self, ways: Sequence[Way]) -> Way | None:
        """Return the first way that is within 5 % of the fastest that fits; None where none fits.

        Micro-batches with under half the tokens of the recipe's, or of the largest that fit, are too small. Where nothing was timed here,
        more is sharded only if memory needs it: the time that DeepSpeed takes for each of a model's many parts is not in the estimates.
        """
        if not self.seconds and self.holds(ways[0], self.tokens):  # mostly; then nothing else has to be counted
            return ways[0]
        fitting = [one for one in map(self.estimate, ways) if one.most_tokens]
        largest = max((min(one.tokens, one.most_tokens) for one in fitting), default=0)
        fitting = [one for one in fitting if one.most_tokens >= largest / 2]
        if not self.seconds:
            fitting = list({one.way.checkpointing: one for one in reversed(fitting)}.values())[::-1]
        fastest = min((one.step_seconds for one in fitting), default=0.0)
        return next((one.way for one in fitting if one.step_seconds <= 1.05 * fastest), None)

    def smallest_change(self, ways: Sequence[Way]) -> str:
        """Return what would let the model fit where none of `ways` does: shorter rows, more ranks, or more memory; a sentence's end."""
        least = min(ways, key=lambda way: self.parts(way, self.longest).total)
        changes = []
        if fits := bisect.bisect_left(range(1, self.longest // STEP + 1), True, key=lambda n: not self.holds(least, STEP * n)) * STEP:
            changes.append(f"rows of at most {fits:,} tokens (prepare with --max_length {fits})")
        more = [times * self.ranks for times in (2, 4, 8, 16, 32, 64) if self.on_gpu]
        if ranks := next((ranks for ranks in more if any(self.holds(way, self.longest, ranks) for way in ways)), None):
            changes.append(f"{ranks} such GPUs")
        needed = (self.parts(least, self.longest).total + KEPT_BACK) / (1 - FRAGMENTS)
        changes.append(f"{needed / 1e9:.0f} GB {'on each GPU' if self.on_gpu else 'for each rank'}")
        if (room := self.room_on_host(least)) > self.host:
            changes[-1] += f" and {room / OF_HOST / 1e9:.0f} GB of host memory"
        return f"{', or '.join(changes)} would do"

    def micro_batches(self) -> list[np.ndarray]:
        """Return the micro-batches of the run's first steps on all ranks, as indices of examples, the one with the most tokens first."""
        lengths = self.work.lengths
        if len(lengths) == 1:
            return [np.zeros(max(1, min(self.recipe.max_tokens_per_gpu // lengths[0], self.batch // self.ranks)), np.int64)]
        found = [examples for dealt in self._first_steps() for share in dealt for examples in share if len(examples)]
        return sorted(found, key=lambda examples: -lengths[examples].sum())

    def _first_steps(self):
        """Yield for each of the run's first 20 steps every rank's micro-batches, as indices of examples."""
        lengths, recipe = self.work.lengths, self.recipe
        for step in range(1, min(self.steps, 20) + 1):
            chosen = batches.step_examples(len(lengths), self.batch, recipe.seed, step)
            dealt = batches.micro_batches(lengths[chosen], recipe.max_tokens_per_gpu, self.ranks, recipe.packing)
            yield [[chosen[part] for part in share] for share in dealt]

    @cache  # noqa: B019 - there is one planner
    def imbalance(self, in_each: bool) -> float:
        """Return the slowest rank's tokens divided by the mean rank's: ranks wait for each other in each micro-batch, or once a step."""
        if len(self.work.lengths) == 1:
            return 1.0
        waited, mean = 0.0, 0.0
        for dealt in self._first_steps():
            tokens = np.array([[self.work.lengths[examples].sum() for examples in share] for share in dealt])
            waited += tokens.max(0).sum() if in_each else tokens.sum(1).max()
            mean += tokens.sum() / self.ranks
        return waited / mean

    def step(self, way: Way, tokens: int) -> tuple[float, float]:
        """Return the seconds of a mean step with micro-batches of `tokens` tokens, and the bytes that a GPU sends in it."""
        micro_batches = max(1, math.ceil(self.work.lengths.mean() * self.batch / self.ranks / tokens))
        zero = Zero.of(read_ds_config(way.ds_config))
        waits, sent = self.imbalance(in_each=zero.stage > 1), self.sent(zero, micro_batches)
        if self.seconds:
            tokens_of_rank = waits * self.work.lengths.mean() * self.batch / self.ranks
            compute = tokens_of_rank * self.seconds.token[way.checkpointing]
            wire, update = micro_batches * self.seconds.micro_batch[way.ds_config], self.seconds.update[way.ds_config]
        else:
            reached = REACHED_COMPILED if self.recipe.compile else REACHED
            compute = waits * self.flops(way.checkpointing) / self.ranks / (self.device.peak * reached)
            across = (sent - self._sent_within_node(zero, micro_batches)) * (self.nodes - 1) / self.nodes
            wire = max(sent / self.device.link, across / self.device.net)
            # offloaded states cross PCIe 5 (50 GB/s), and the CPU updates them at the speed of its memory
            update = 28 * self.count / self.ranks / 20e9 if zero.offload_optimizer else 0.0
        if zero.stage == 3 and self.on_gpu:  # weights are sent while others are computed with; a CPU has to do both
            wire = max(wire - compute, 0.1 * wire)
        return compute + wire + update, sent

    def sent(self, zero: Zero, micro_batches: int) -> float:
        """Return the bytes that a GPU sends in a step of `micro_batches` micro-batches."""
        size, others = self.dtype.itemsize * self.count, (self.ranks - 1) / self.ranks
        if zero.stage == 3:
            near = self._sent_within_node(zero, micro_batches)
            gathers = 1 if near else micro_batches  # of the weights from all ranks, each with the gradients' reduce-scatter
            sent = (gathers + micro_batches) * size * others
            sent += near or micro_batches * self._gathered_again(zero) * others
        else:  # gradients by all-reduce, twice what a reduce-scatter sends: DeepSpeed 0.19.8 does so by default
            sums = 2 * size * (micro_batches if zero.stage == 2 else 1)
            sent = (sums + (size if zero.stage else 0)) * others
        if self.reference:
            again = self._head_is_gathered_again(Zero.of(read_ds_config(REFERENCE)).reuse_distance)
            sent += micro_batches * (size + self.dtype.itemsize * self.embedding * again) * others
        return sent

    def _sent_within_node(self, zero: Zero, micro_batches: int) -> float:
        """Return the bytes of weights that a GPU sends within its node in a step, which with hpZ has a second copy of them.

        All passes gather from it but the first after an optimizer step (DeepSpeed 0.19.8). Without a copy there are none.
        """
        if zero.ranks_of_node == 1:
            return 0.0
        again = (micro_batches - 1) * self.dtype.itemsize * self.count + micro_batches * self._gathered_again(zero)
        return again * (zero.ranks_of_node - 1) / zero.ranks_of_node

    def _gathered_again(self, zero: Zero) -> float:
        """Return the bytes of weights that are gathered twice for a micro-batch at ZeRO-3; those whose next use is near stay gathered."""
        half, embedding = zero.reuse_distance / 2, self.embedding
        if not self.tied:
            again = self.count - max(half, embedding)
        else:  # the head, which is the embedding, is used between the two passes, twice in a row
            again = self.count - embedding - max(0.0, half - embedding) + 2 * embedding * self._head_is_gathered_again(zero.reuse_distance)
        return self.dtype.itemsize * max(0.0, again)

    def _head_is_gathered_again(self, reuse_distance: int) -> bool:
        """Whether a head tied to the embedding is gathered anew: more weights than `reuse_distance` are used between the two."""
        return self.tied and self.count - self.embedding >= reuse_distance

    def flops(self, checkpointing: str) -> float:
        """Return the FLOPs of a mean step over all ranks: 2 a weight and token forward, 4 backward; attention by its query-key pairs."""
        c = self.config
        heads, depth = heads_of(c), c.num_hidden_layers  # of a mean layer:
        attend = c.hidden_size * sum(one.width * (2 * one.queries + 2 * one.keys) for one in heads) / depth
        inner = getattr(c, "intermediate_size", None)  # GPT-2 has none: what else a layer has then counts as its feed-forward block
        feed = 3 * c.hidden_size * inner if isinstance(inner, int) else self.piece - self.embedding - attend
        tokens, trained = self.work.lengths.mean(), self._log_probs().mean()
        pairs = 2 * 2 * sum(one.queries * one.width for one in heads) / depth * self.work.attended().mean()
        layer, head = 2 * (attend + feed) * tokens + pairs, 2 * c.vocab_size * c.hidden_size * trained
        again = {"none": 0, "selective": 2 * feed * tokens}.get(checkpointing, layer)
        whole = depth * (3 * layer + again) + 3 * head
        if self.reference:
            whole += depth * layer + head
        return self.batch * whole

    def _log_probs(self) -> np.ndarray:
        """Return how many log-probs each example needs: of its trained tokens in SFT, of both answers in DPO."""
        return self.work.trained if self.work.answers.shape[1] == 1 else self.work.answers.sum(1)
