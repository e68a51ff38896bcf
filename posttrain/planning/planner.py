"""How much memory and time each way of running a recipe takes: what plan.py prints, and max_tokens_per_gpu: auto goes by."""

import bisect
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from posttrain.data import batches
from posttrain.engine.ds_config import read_ds_config
from posttrain.planning.activations import count_working
from posttrain.planning.machines import FRAGMENTS, KEPT_BACK, Device
from posttrain.planning.memory import Layout, Parts, Working, Zero, peak
from posttrain.planning.work import the_model, the_work
from posttrain.recipes.keys import AUTO, DPORecipe, Recipe

# Of its peak, one H200 made of SFT of 1.7B parameters (benchmarks/results/phases_gpu.json, sft_gpu.json with --compile)
REACHED, REACHED_COMPILED = 0.41, 0.446
CHECKPOINTING = ("none", "selective", "full")
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
MANY = 16_384  # tokens of a micro-batch


@dataclass(frozen=True)
class Seconds:
    """What was timed on a machine; the first by way of checkpointing activations, the others by ds_config."""

    token: dict[str, float]  # forward and backward, and forward of the reference
    micro_batch: dict[str, float]  # beside its tokens: gradients and gathered weights on their way
    update: dict[str, float]  # of all weights


@dataclass(frozen=True)
class Plan:
    """One way to run: what it takes, and how fast it is."""

    ds_config: str
    checkpointing: str
    parts: Parts  # with micro-batches of `tokens`
    tokens: int
    most_tokens: int  # of a micro-batch that fits; 0: none
    step_seconds: float
    sent: float  # bytes that a GPU sends a step


class Planner:
    """Of a recipe on so many GPUs. `seconds`: what was timed on this machine (timing.py); without, times come from the device's peak."""

    def __init__(self, recipe: Recipe, device: Device, gpus: int, nodes: int, assumed: str | None = None):
        if recipe.max_tokens_per_gpu == AUTO:
            recipe = recipe.model_copy(update={"max_tokens_per_gpu": 2**31})
        self.recipe, self.device, self.nodes, self.ranks = recipe, device, nodes, gpus * nodes
        self.on_gpu = device.name != "CPU"
        self.dtype = getattr(torch, recipe.dtype)
        self.config, self.count, self.model_said = the_model(recipe, assumed)
        embedding = self.config.vocab_size * self.config.hidden_size
        self.embedding, self.tied = embedding, getattr(self.config, "tie_word_embeddings", False)
        self.piece = embedding + (self.count - embedding) // self.config.num_hidden_layers
        self.work, self.work_said = the_work(recipe)
        self.reference = isinstance(recipe, DPORecipe) and recipe.needs_reference and recipe.reference == "beside"
        self.batch = recipe.global_batch_size or (recipe.batch_size or 1) * (recipe.gradient_accumulation_steps or 1) * self.ranks
        self.steps = recipe.max_iters or math.ceil((recipe.epochs or 1) * self.work.count / self.batch)
        if self.work.lengths.max() > recipe.max_tokens_per_gpu:
            raise ValueError(
                f"the longest example has {self.work.lengths.max():,} tokens, more than max_tokens_per_gpu={recipe.max_tokens_per_gpu:,}"
            )
        self.usable = device.memory * (1 - FRAGMENTS) - KEPT_BACK
        self.usual_tokens = int(self.work.lengths[self.micro_batches()[0]].sum())
        self.seconds: Seconds | None = None

    def parts(self, ds_config: str, checkpointing: str, tokens: int) -> Parts:
        """A rank's memory with micro-batches of at most `tokens`. `ds_config`: a path."""
        layout = Layout(Zero.of(read_ds_config(ds_config)), self.ranks, self.dtype, self.on_gpu)
        largest, usual = (self.working(most, checkpointing) for most in (tokens, min(tokens, self.usual_tokens)))
        return peak(self.count, self.piece, layout, largest, usual, self.reference)

    def working(self, tokens: int, checkpointing: str) -> Working:
        """As count_working, which beyond MANY grows by as much with each token."""
        counted = [self._counted(min(tokens, MANY), checkpointing)]
        if tokens > MANY:
            counted.append(self._counted(2 * MANY, checkpointing))
            return Working(*(few + (many - few) * (tokens - MANY) / MANY for few, many in zip(*counted, strict=True)))
        return counted[0]

    @cache  # noqa: B019 - there is one planner
    def _counted(self, tokens: int, checkpointing: str) -> Working:
        return count_working(self.config, self.work.micro_batch(tokens), self.dtype, checkpointing, self.on_gpu)

    def most_tokens(self, ds_config: str, checkpointing: str) -> int:
        """Of a micro-batch that fits, in whole 1,024; 0 where the longest example does not. `ds_config`: a path."""
        longest = int(self.work.lengths.max())
        if self.parts(ds_config, checkpointing, longest).total > self.usable:
            return 0
        fits = bisect.bisect_left(range(1, 2048), True, key=lambda n: self.parts(ds_config, checkpointing, 1024 * n).total > self.usable)
        return max(1024 * fits, longest)

    def plan(self, ds_config: str, checkpointing: str) -> Plan:
        """`ds_config`: the name of one of ds_configs/."""
        path = f"ds_configs/{ds_config}.json"
        tokens = min(self.recipe.max_tokens_per_gpu, batches.most_of_a_rank(self.work.lengths, self.batch, self.ranks))
        parts = self.parts(path, checkpointing, tokens)
        most = self.most_tokens(path, checkpointing)
        used = min(tokens, most) if most else tokens
        seconds, sent = self.step(ds_config, checkpointing, used)
        return Plan(ds_config, checkpointing, parts, tokens, most, seconds, sent)

    def micro_batches(self) -> list[np.ndarray]:
        """Examples of the micro-batches of the run's first steps, of all ranks, the one with the most tokens first."""
        lengths = self.work.lengths
        if len(lengths) == 1:
            return [np.zeros(max(1, min(self.recipe.max_tokens_per_gpu // lengths[0], self.batch // self.ranks)), np.int64)]
        found = [examples for dealt in self._first_steps() for share in dealt for examples in share if len(examples)]
        return sorted(found, key=lambda examples: -lengths[examples].sum())

    def _first_steps(self):
        """Of each of the run's first steps, each rank's micro-batches of examples."""
        lengths, recipe = self.work.lengths, self.recipe
        for step in range(1, min(self.steps, 20) + 1):
            chosen = batches.step_examples(len(lengths), self.batch, recipe.seed, step)
            dealt = batches.micro_batches(lengths[chosen], recipe.max_tokens_per_gpu, self.ranks, recipe.packing)
            yield [[chosen[part] for part in share] for share in dealt]

    @cache  # noqa: B019 - there is one planner
    def slowest(self, in_each: bool) -> float:
        """Tokens of the rank that the others wait for, by the mean rank's: they wait in each micro-batch, or once a step."""
        if len(self.work.lengths) == 1:
            return 1.0
        waited, mean = 0.0, 0.0
        for dealt in self._first_steps():
            tokens = np.array([[self.work.lengths[examples].sum() for examples in share] for share in dealt])
            waited += tokens.max(0).sum() if in_each else tokens.sum(1).max()
            mean += tokens.sum() / self.ranks
        return waited / mean

    def step(self, ds_config: str, checkpointing: str, tokens: int) -> tuple[float, float]:
        """Seconds of a mean step with micro-batches of so many tokens, and bytes that a GPU sends in it."""
        micro_batches = max(1, math.ceil(self.work.lengths.mean() * self.batch / self.ranks / tokens))
        zero = Zero.of(read_ds_config(f"ds_configs/{ds_config}.json"))
        waits, sent = self.slowest(in_each=zero.stage > 1), self.sent(zero, micro_batches)
        if self.seconds:
            tokens_of_rank = waits * self.work.lengths.mean() * self.batch / self.ranks
            compute = tokens_of_rank * self.seconds.token[checkpointing]
            wire, update = micro_batches * self.seconds.micro_batch[ds_config], self.seconds.update[ds_config]
        else:
            reached = REACHED_COMPILED if self.recipe.compile else REACHED
            compute = waits * self.flops(checkpointing) / self.ranks / (self.device.peak * reached)
            # hpZ gathers weights within the node in the backward pass, from other nodes only in the forward pass
            within = self._gathered_again(zero) * micro_batches if zero.ranks_of_node > 1 else 0.0
            across = (sent - within) * (self.nodes - 1) / self.nodes
            wire = max(sent / self.device.link, across / self.device.net)
            # offloaded states cross PCIe 5, 50 GB/s, and the CPU steps them at its memory's speed
            update = 28 * self.count / self.ranks / 20e9 if zero.offload_optimizer else 0.0
        if zero.stage == 3 and self.on_gpu:  # weights are on their way while others compute; a CPU has to do both
            wire = max(wire - compute, 0.1 * wire)
        return compute + wire + update, sent

    def sent(self, zero: Zero, micro_batches: int) -> float:
        """Bytes that a GPU sends in a step."""
        size, others = self.dtype.itemsize * self.count, (self.ranks - 1) / self.ranks
        if zero.stage == 3:
            sent = micro_batches * (2 * size * others + self._gathered_again(zero))
        else:  # gradients by all-reduce, twice what a reduce-scatter sends: DeepSpeed 0.19.8 does so by default
            sums = 2 * size * (micro_batches if zero.stage == 2 else 1)
            sent = (sums + (size if zero.stage else 0)) * others
        if self.reference:
            again = self._head_is_gathered_again(Zero.of(read_ds_config("ds_configs/zero3_inference.json")).reuse_distance)
            sent += micro_batches * (size + self.dtype.itemsize * self.embedding * again) * others
        return sent

    def _gathered_again(self, zero: Zero) -> float:
        """Bytes of weights that a pass at ZeRO-3 asks of the other ranks once more: those that it needs soonest stay gathered."""
        half, embedding = zero.reuse_distance / 2, self.embedding
        if not self.tied:
            again = self.count - max(half, embedding)
        else:  # the head, which is the embedding, is used in the middle, twice in a row
            again = self.count - embedding - max(0.0, half - embedding) + 2 * embedding * self._head_is_gathered_again(zero.reuse_distance)
        return self.dtype.itemsize * max(0.0, again) * (self.ranks - 1) / self.ranks

    def _head_is_gathered_again(self, reuse_distance: int) -> bool:
        """Whether so many layers lie between it and the embedding, that it is."""
        return self.tied and self.count - self.embedding >= reuse_distance

    def flops(self, checkpointing: str) -> float:
        """Of a mean step, over all ranks: 2 a weight and token forward, 4 backward; attention by its pairs of tokens."""
        c = self.config
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        attend = c.hidden_size * width * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        feed = 3 * c.hidden_size * c.intermediate_size
        tokens, trained = self.work.lengths.mean(), self._log_probs().mean()
        pairs = 2 * 2 * c.num_attention_heads * width * self.work.attended().mean()
        layer, head = 2 * (attend + feed) * tokens + pairs, 2 * c.vocab_size * c.hidden_size * trained
        again = {"none": 0, "selective": 2 * feed * tokens, "full": layer}[checkpointing]
        whole = c.num_hidden_layers * (3 * layer + again) + 3 * head
        if self.reference:
            whole += c.num_hidden_layers * layer + head
        return self.batch * whole

    def _log_probs(self) -> np.ndarray:
        return self.work.trained if self.work.answers.shape[1] == 1 else self.work.answers.sum(1)
