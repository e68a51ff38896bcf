"""What a recipe will take, before it runs: memory of each GPU by part, the largest micro-batch, time, communication, and which ds_config.

python posttrain/plan.py RECIPE.yaml [--gpus=8] [--nodes=1] [--gpu=b200|b300|h200|h100|a100|here] [--model=1.8b|8b|32b|70b] [--key=value]

Where the recipe's model or data is not there yet, --model's shape and rows of 2,048 tokens are assumed, and said to be. `here` times the
model's own layers on this machine; for other GPUs times come from the share of its peak that one H200 reached.
"""

import argparse
import bisect
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from posttrain import attention, batches, checkpoint, ckpt_pt, data, layers
from posttrain.config import DPORecipe, Recipe, load_recipe_of_either_kind
from posttrain.engine import read_ds_config
from posttrain.memory import Parts, Zero, count_working, predict
from posttrain.objectives import needs_reference
from posttrain.policy import Policy, find_model

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
    def __init__(self, recipe: Recipe, device: Device, gpus: int, nodes: int, assumed: str | None):
        self.recipe, self.device, self.nodes, self.ranks = recipe, device, nodes, gpus * nodes
        self.on_gpu = device.name != "CPU"
        self.dtype = getattr(torch, recipe.dtype)
        self.config, self.count, self.model_said = the_model(recipe, assumed)
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
        self.seconds = _timed_here(self) if device in HERE else {}

    def parts(self, ds_config: str, checkpointing: str, tokens: int) -> Parts:
        usual = self.working(min(tokens, self.usual_tokens), checkpointing)
        zero = Zero.of(read_ds_config(f"ds_configs/{ds_config}.json"))
        return predict(self.working(tokens, checkpointing), usual, self.count, zero, self.ranks, self.dtype, self.reference, self.on_gpu)

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
        """Of a micro-batch that fits, in whole 1,024; 0 where the longest example does not."""
        longest = int(self.work.lengths.max())
        if self.parts(ds_config, checkpointing, longest).total > self.usable:
            return 0
        fits = bisect.bisect_left(range(1, 2048), True, key=lambda n: self.parts(ds_config, checkpointing, 1024 * n).total > self.usable)
        return max(1024 * fits, longest)

    def plan(self, ds_config: str, checkpointing: str) -> Plan:
        tokens = min(self.recipe.max_tokens_per_gpu, self._a_rank_s_step())
        parts = self.parts(ds_config, checkpointing, tokens)
        most = self.most_tokens(ds_config, checkpointing)
        used = min(tokens, most) if most else tokens
        seconds, sent = self.step(ds_config, checkpointing, used)
        return Plan(ds_config, checkpointing, parts, tokens, most, seconds, sent)

    def _a_rank_s_step(self) -> int:
        """Tokens that a rank has in a step at most: a micro-batch is never larger."""
        longest = np.sort(self.work.lengths)[-self.batch :]
        return math.ceil(longest.mean() * self.batch / self.ranks) + int(longest.max())

    def micro_batches(self) -> list[np.ndarray]:
        """Examples of the micro-batches of the run's first steps, of all ranks, the one with the most tokens first."""
        lengths, recipe = self.work.lengths, self.recipe
        if len(lengths) == 1:
            return [np.zeros(max(1, min(recipe.max_tokens_per_gpu // lengths[0], self.batch // self.ranks)), np.int64)]
        found = []
        for step in range(1, min(self.steps, 20) + 1):
            chosen = batches.step_examples(len(lengths), self.batch, recipe.seed, step)
            dealt = batches.micro_batches(lengths[chosen], recipe.max_tokens_per_gpu, self.ranks, recipe.packing)
            found += [chosen[part] for share in dealt for part in share if part]
        return sorted(found, key=lambda examples: -lengths[examples].sum())

    def step(self, ds_config: str, checkpointing: str, tokens: int) -> tuple[float, float]:
        """Seconds of a mean step with micro-batches of so many tokens, and bytes that a GPU sends in it."""
        micro_batches = max(1, math.ceil(self.work.lengths.mean() * self.batch / self.ranks / tokens))
        if self.seconds:
            share = self.work.lengths.mean() * self.batch / self.ranks
            compute = share * self.seconds[checkpointing] + self.seconds["update"] * self.count / (
                self.ranks if ds_config != "zero0" else 1
            )
        else:
            reached = REACHED_COMPILED if self.recipe.compile else REACHED
            compute = self.flops(checkpointing) / self.ranks / (self.device.peak * reached)
        size, others = self.dtype.itemsize * self.count, (self.ranks - 1) / self.ranks
        sent = {
            "zero0": 2 * size,
            "zero1": 4 * self.count + size,
            "zero2": micro_batches * size + size,
        }.get(ds_config, micro_batches * 3 * size) * others
        if self.reference:
            sent += micro_batches * size * others
        # hpZ gathers weights within the node in the backward pass, from other nodes only in the forward pass
        across = (sent - micro_batches * size * others if ds_config == "zeropp" else sent) * (self.nodes - 1) / self.nodes
        wire = max(sent / self.device.link, across / self.device.net)
        exposed = max(wire - compute, 0.1 * wire) if ds_config.startswith(("zero3", "zeropp")) else wire
        if ds_config == "zero3_offload":  # states cross PCIe 5, 50 GB/s, and the CPU steps them at its memory's speed
            exposed += 28 * self.count / self.ranks / 20e9
        return compute + exposed, sent

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

    def feed_forward_share(self) -> float:
        """Of a layer's forward pass, by its weights."""
        c = self.config
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        feed = 3 * c.hidden_size * c.intermediate_size
        return feed / (feed + c.hidden_size * width * (2 * c.num_attention_heads + 2 * c.num_key_value_heads))

    def _log_probs(self) -> np.ndarray:
        return self.work.trained if self.work.answers.shape[1] == 1 else self.work.answers.sum(1)


HERE: list[Device] = []


def this_machine(ranks: int) -> Device:
    """A rank's share of it."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        known = [gpu for gpu in GPUS.values() if gpu.name in properties.name]
        device = replace(known[0] if known else GPUS["a100"], name=properties.name, memory=properties.total_memory)
    else:
        device = Device("CPU", psutil.virtual_memory().available / ranks, 1e12, 5e9)
    HERE.append(device)
    return device


def _timed_here(planner: Planner) -> dict[str, float]:
    """Seconds of a token, forward and backward, with each way of checkpointing activations; and of the update of a parameter."""
    device = torch.device("cuda" if planner.on_gpu else "cpu")
    if not planner.on_gpu:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // planner.ranks))
    usual = planner.micro_batches()
    usual = usual[len(usual) // 2]
    if not planner.on_gpu:  # some thousand tokens take long enough
        usual = usual[: max(1, int(np.searchsorted(planner.work.lengths[usual].cumsum(), 4096)))]
    batch = planner.work.batch_of(usual)
    batch = batch.to(device)
    # a layer's time is the difference between models of few and of more; the rest is the head's
    few, more = 1, min(4, planner.config.num_hidden_layers)
    whole, part = {}, {}
    for name, trains in (("train", True), ("forward", False)):
        short, long = (_seconds_of(planner, depth, batch, trains, device) for depth in (few, more))
        part[name] = max(long - short, 0.0) / max(1, more - few)
        whole[name] = short + (planner.config.num_hidden_layers - few) * part[name]
    reference = whole["forward"] if planner.reference else 0.0
    again = {"none": 0.0, "selective": planner.feed_forward_share(), "full": 1.0}
    layers_again = planner.config.num_hidden_layers * part["forward"]
    tokens = batch.input_ids.shape[1]
    found = {mode: (whole["train"] + reference + share * layers_again) / tokens for mode, share in again.items()}
    weights = torch.nn.Parameter(torch.randn(4_000_000, device=device))
    weights.grad = torch.randn_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)
    # beside the optimizer DeepSpeed reads and writes as much again: norms, clipping, copies to and from its flat buffers
    found["update"] = 2 * _median(optimizer.step) / len(weights)
    return found


def _seconds_of(planner: Planner, depth: int, batch: data.MicroBatch, trains: bool, device: torch.device) -> float:
    """Of forward, and backward where it trains, of a model with random weights and so many layers."""
    config = type(planner.config).from_dict({**planner.config.to_dict(), "num_hidden_layers": depth, "layer_types": None})
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=planner.dtype).train()
    name, _ = attention.choose(planner.recipe.kernels, device, planner.dtype, 0.0, config)
    layers.choose(model, planner.recipe.kernels, compiled=False)
    policy = Policy(model, name)
    policy.head.choose(planner.recipe.kernels)
    if trains:
        return _median(lambda: policy(batch).sum().backward())
    with torch.no_grad():
        return _median(lambda: policy(batch))


def _median(action, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def best(plans: list[Plan], dtype: torch.dtype) -> Plan | None:
    """Of those that fit with at least half the recipe's micro-batch, or with any, the fastest, or the first within 5 % of it.

    ZeRO-0 adds up gradients in bfloat16, which is less exact: not in that dtype.
    """
    fitting = [plan for plan in plans if plan.most_tokens and (plan.ds_config != "zero0" or dtype == torch.float32)]
    fitting = [plan for plan in fitting if plan.most_tokens >= plan.tokens / 2] or fitting
    fastest = min((plan.step_seconds for plan in fitting), default=0.0)
    return next((plan for plan in fitting if plan.step_seconds <= 1.05 * fastest), None)


def report(planner: Planner, plans: list[Plan]) -> str:
    device, recipe = planner.device, planner.recipe
    here = device in HERE
    lines = [
        f"model     {planner.model_said}, {planner.count:,} parameters",
        f"data      {planner.work_said}",
        f"run       {planner.steps:,} steps of {planner.batch:,} examples on {planner.ranks} x {device.name}",
        "",
        f"GB of each rank's {device.memory / 1e9:.0f} ({planner.usable / 1e9:.0f} usable), micro-batches of {plans[0].tokens:,} tokens",
        "",
        f"{'ds_config':14}{'activations':>13}{'weights':>9}{'grads':>7}{'optim.':>8}{'buffers':>9}{'activ.':>8}{'head':>6}{'ref.':>6}{'total':>8}"
        f"{'most tokens':>13}{'s/step':>8}{'sent':>8}",
    ]
    for plan in plans:
        p = plan.parts
        numbers = [p.weights, p.gradients, p.optimizer, p.buffers, p.activations, p.head, p.reference, p.total]
        widths = (9, 7, 8, 9, 8, 6, 6, 8)
        row = "".join(f"{value / 1e9:>{width}.1f}" for value, width in zip(numbers, widths, strict=True))
        fits = f"{plan.most_tokens:>13,}{plan.step_seconds:>8.2f}{plan.sent / 1e9:>8.1f}" if plan.most_tokens else f"{'does not fit':>29}"
        lines.append(f"{plan.ds_config:14}{plan.checkpointing:>13}{row}{fits}")
    chosen = best(plans, planner.dtype)
    if chosen is None:
        lines += ["", f"nothing fits into {planner.usable / 1e9:.0f} GB: take more GPUs, or a ds_config that offloads (zero3_offload)"]
    else:
        hours = chosen.step_seconds * planner.steps / 3600
        tokens = planner.work.lengths.mean() * planner.batch / chosen.step_seconds
        lines += [
            "",
            f"take      --ds_config=ds_configs/{chosen.ds_config}.json --activation_checkpointing={chosen.checkpointing} "
            f"--max_tokens_per_gpu={min(chosen.most_tokens, max(recipe.max_tokens_per_gpu, int(planner.work.lengths.max())))}",
            f"time      {chosen.step_seconds:.2f} s a step, {tokens:,.0f} tokens/s, {_duration(hours)} in all, "
            f"{hours * planner.ranks:,.1f} GPU-hours",
        ]
    if here:
        lines.append("how sure  the layers were timed here; how near six runs on a CPU came: benchmarks/results/plan_cpu.json")
    else:
        lines.append(
            "how sure  memory: within 2 % of two runs on one H200; time: by the share of its peak that it reached with 1.7B parameters,\n"
            "          on other GPUs, with other sizes and over links not measured"
        )
    return "\n".join(lines)


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8, help="of each node; on a CPU ranks")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu", default="b200", choices=[*GPUS, "here"])
    parser.add_argument("--model", choices=list(SHAPES), help="the shape to assume where the recipe's model is not there")
    options, others = parser.parse_known_args(arguments)
    if options.gpus < 1 or options.nodes < 1:
        raise ValueError(f"--gpus and --nodes should be at least 1, saw {options.gpus} and {options.nodes}")
    recipe = load_recipe_of_either_kind(others)
    device = this_machine(options.gpus) if options.gpu == "here" else GPUS[options.gpu]
    planner = Planner(recipe, device, options.gpus, options.nodes, options.model)
    stages = STAGES if options.nodes == 1 else (*STAGES, "zeropp")
    shown = [(stage, mode) for stage in stages for mode in CHECKPOINTING if stage != "zero3_offload" or mode == "full"]
    print(report(planner, [planner.plan(*way) for way in shown]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
