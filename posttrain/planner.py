"""How much memory and time each way of running a recipe takes: what plan.py prints, and max_tokens_per_gpu: auto goes by."""

import bisect
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from posttrain import batches, checkpoint, ckpt_pt, data
from posttrain.config import AUTO, DPORecipe, Recipe
from posttrain.engine import read_ds_config
from posttrain.memory import Parts, Zero, count_working, predict
from posttrain.objectives import needs_reference
from posttrain.policy import find_model

MIB = 2**20
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768}


def _shape(kind, hidden: int, feed_forward: int, depth: int, heads: int, **others):
    sizes = {"hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": depth, "num_attention_heads": heads}
    return kind(**sizes, **others)


SHAPES = {
    "1.8b": ("Qwen3-1.7B", _shape(Qwen3Config, 2048, 6144, 28, 16, **QWEN3, tie_word_embeddings=True)),
    "8b": ("Qwen3-8B", _shape(Qwen3Config, 4096, 12288, 36, 32, **QWEN3, tie_word_embeddings=False)),
    "32b": ("Qwen3-32B", _shape(Qwen3Config, 5120, 25600, 64, 64, **QWEN3, tie_word_embeddings=False)),
    "70b": ("Llama-3.1-70B", _shape(LlamaConfig, 8192, 28672, 80, 64, vocab_size=128256, num_key_value_heads=8)),
}


@dataclass(frozen=True)
class Device:
    """What its maker says; memory as its driver shows it."""

    name: str
    memory: float  # bytes
    peak: float  # bfloat16 FLOP/s of the matrix units
    link: float  # bytes/s, one way, to the others of its node
    net: float = 50e9  # bytes/s, one way, to other nodes: 400 Gbit/s a GPU


GPUS = {
    "b300": Device("B300", 275_040 * MIB, 2500e12, 900e9),
    "b200": Device("B200", 183_359 * MIB, 2250e12, 900e9),
    "h200": Device("H200", 143_771 * MIB, 989e12, 450e9),
    "h100": Device("H100", 81_559 * MIB, 989e12, 450e9),
    "a100": Device("A100", 81_920 * MIB, 312e12, 300e9),
}
# Of its peak, one H200 made of SFT of 1.7B parameters (benchmarks/results/phases_gpu.json, sft_gpu.json with --compile)
REACHED, REACHED_COMPILED = 0.41, 0.446
KEPT_BACK = 2e9  # bytes: the driver's context, NCCL's buffers
FRAGMENTS = 0.06  # of the memory, that an allocator cannot use
CHECKPOINTING = ("none", "selective", "full")
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
MANY = 16_384  # tokens of a micro-batch
ASSUMED_ROW, ASSUMED_ROWS = 2048, 50_000


@dataclass(frozen=True)
class Work:
    """The examples that a run sees: arrays of one entry an example, or a single one that all are alike."""

    count: int
    prompt: np.ndarray  # tokens before the answers; for SFT none are apart
    answers: np.ndarray  # (examples, 1 or 2)
    trained: np.ndarray
    shared: bool  # the prompt is computed once for both answers

    @property
    def lengths(self) -> np.ndarray:
        copies = 1 if self.shared else self.answers.shape[1]
        return self.prompt * copies + self.answers.sum(1)

    def attended(self) -> np.ndarray:
        """Pairs of query and key of each example, causal."""
        whole = (self.prompt[:, None] + self.answers) ** 2 / 2
        again = (self.answers.shape[1] - 1) * self.prompt**2 / 2 if self.shared else 0
        return whole.sum(1) - again

    def micro_batch(self, tokens: int) -> data.MicroBatch:
        """As many of the longest examples as `tokens` hold, and a shorter one in what is left."""
        chosen, left = [], tokens
        order = np.argsort(self.lengths, kind="stable")
        ascending = self.lengths[order]
        while (fits := int(np.searchsorted(ascending, left, side="right"))) and (left == tokens or left > tokens / 64):
            chosen.append(int(order[fits - 1]))
            left -= int(ascending[fits - 1])
        return self.batch_of(chosen)

    def batch_of(self, examples) -> data.MicroBatch:
        builder = data.RowBuilder()
        for index in examples:
            self._add(builder, int(index))
        return builder.build()

    def _add(self, builder: data.RowBuilder, index: int) -> None:
        prompt, answers, trained = int(self.prompt[index]), self.answers[index].tolist(), int(self.trained[index])
        if len(answers) == 2:
            builder.add_pair([0] * prompt, [0] * answers[0], [0] * answers[1], self.shared)
        else:
            builder.add_sequence([0] * answers[0], [data.IGNORE] * (answers[0] - trained) + [0] * trained)


def the_model(recipe: Recipe, assumed: str | None):
    """Its configuration, how many parameters, and what is said of it."""
    try:
        find_model(recipe.model_path, "")
    except FileNotFoundError:
        name, config = SHAPES[assumed or "1.8b"]
        return config, count_parameters(config), f"there is none at {recipe.model_path} yet: assumed {name}'s shape"
    if assumed:
        raise ValueError(f"--model={assumed} would not be read: the recipe's model, {recipe.model_path}, is there. Remove it")
    if ckpt_pt.is_ckpt_pt(recipe.model_path):
        config = ckpt_pt.load_ckpt_pt(recipe.model_path, None).config
    else:
        place = Path(recipe.model_path)
        config = AutoConfig.from_pretrained(checkpoint.model_description(place) if checkpoint.is_checkpoint(place) else recipe.model_path)
    return config, count_parameters(config), recipe.model_path


def count_parameters(config) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def the_work(recipe: Recipe) -> tuple[Work, str]:
    """The training examples, and what is said of them."""
    kind, shared = ("dpo", recipe.share_prompt) if isinstance(recipe, DPORecipe) else ("sft", False)
    if not Path(recipe.data_dir).is_dir():
        one = np.ones(1, np.int64)
        said = f"there is none at {recipe.data_dir} yet: assumed rows of {ASSUMED_ROW:,} tokens"
        if kind == "sft":
            return Work(ASSUMED_ROWS, 0 * one, ASSUMED_ROW * one[:, None], ASSUMED_ROW * one, False), said
        half = ASSUMED_ROW // 2
        pairs = Work(ASSUMED_ROWS, half * one, half * np.ones((1, 2), np.int64), half * one, shared)
        return pairs, f"{said} ({half:,} of prompt, {half:,} an answer)"
    split = data.load(recipe.data_dir, kind, "", getattr(recipe, "share_prompt", True)).train
    said = f"{recipe.data_dir}: {len(split):,} examples of {split.lengths.mean():,.0f} tokens, the longest {split.lengths.max():,}"
    if kind == "sft":
        return Work(len(split), np.zeros(len(split), np.int64), split.lengths[:, None], split.trained, False), said
    prompt, *answers = (split.token_counts(name) for name in ("prompt", "chosen", "rejected"))
    return Work(len(split), prompt, np.stack(answers, 1), split.trained, shared), said


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
        self.reference = isinstance(recipe, DPORecipe) and needs_reference(recipe) and recipe.reference == "beside"
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
        """`ds_config`: a path."""
        usual = self.working(min(tokens, self.usual_tokens), checkpointing)
        zero = Zero.of(read_ds_config(ds_config))
        largest = self.working(tokens, checkpointing)
        return predict(largest, usual, self.count, self.piece, zero, self.ranks, self.dtype, self.reference, self.on_gpu)

    def working(self, tokens: int, checkpointing: str) -> tuple[float, float]:
        """As count_working, which beyond MANY grows by as much with each token."""
        counted = [self._counted(min(tokens, MANY), checkpointing)]
        if tokens > MANY:
            counted.append(self._counted(2 * MANY, checkpointing))
            return tuple(few + (many - few) * (tokens - MANY) / MANY for few, many in zip(*counted, strict=True))
        return counted[0]

    @cache  # noqa: B019 - there is one planner
    def _counted(self, tokens: int, checkpointing: str) -> tuple[int, int]:
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


def this_machine(ranks: int) -> Device:
    """A rank's share of it."""
    if not torch.cuda.is_available():
        return Device("CPU", psutil.virtual_memory().available / ranks, 1e12, 1e9)
    properties = torch.cuda.get_device_properties(0)
    known = [gpu for gpu in GPUS.values() if gpu.name in properties.name]
    return replace(known[0] if known else GPUS["a100"], name=properties.name, memory=properties.total_memory)
