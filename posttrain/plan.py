"""What a recipe will take, before it runs: memory of each GPU by part, the largest micro-batch, time, communication, and which ds_config.

python posttrain/plan.py RECIPE.yaml [--gpus=8] [--nodes=1] [--gpu=b200|b300|h200|h100|a100|here] [--model=1.8b|8b|32b|70b] [--key=value]

Where the recipe's model or data is not there yet, --model's shape and rows of 2,048 tokens are assumed, and said to be. `here` times the
model's own layers on this machine; for other GPUs times come from the share of its peak that one H200 reached.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from posttrain import attention, data, layers
from posttrain.config import load_recipe_of_either_kind
from posttrain.planner import CHECKPOINTING, GPUS, SHAPES, STAGES, Plan, Planner, this_machine
from posttrain.policy import Policy, checkpoint_activations

WHOLE = 500e6  # parameters of a model that is timed as it is; of a larger one some layers are


def time_here(planner: Planner, modes: tuple[str, ...] = CHECKPOINTING) -> None:
    """Let a planner go by what this machine takes: on a CPU with all its ranks at work at once, which share caches and memory.

    `modes`: ways of checkpointing activations.
    """
    if planner.on_gpu or planner.ranks == 1:
        planner.seconds = _timed(planner, modes)
        return
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(planner.ranks, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_timed, planner, modes, rank, f"{folder}/store") for rank in range(planner.ranks)]
        found = [rank.result() for rank in ranks]
    planner.seconds = {name: max(one[name] for one in found) for name in found[0]}
    planner.device = replace(planner.device, link=1 / planner.seconds["sent"])


def _timed(planner: Planner, modes: tuple[str, ...], rank: int = 0, store: str | None = None) -> dict[str, float]:
    """Seconds of a token, forward and backward, with each way of checkpointing activations; of the update of a weight; of a byte sent."""
    device = torch.device("cuda" if planner.on_gpu else "cpu")
    if store:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // planner.ranks))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=planner.ranks)
    usual = planner.micro_batches()
    usual = usual[len(usual) // 2]
    if not planner.on_gpu:  # some thousand tokens take long enough
        usual = usual[: max(1, int(np.searchsorted(planner.work.lengths[usual].cumsum(), 4096)))]
    batch = planner.work.batch_of(usual)
    batch = batch.to(device)
    found, depth = {}, planner.config.num_hidden_layers
    for mode in (*modes, *["reference"] * planner.reference):
        if planner.count <= WHOLE:
            seconds = _seconds_of(planner, depth, batch, mode, device)
        else:  # a layer's time is the difference between models of few and of more; the rest is the head's
            few, more = 1, min(4, depth)
            short, long = (_seconds_of(planner, count, batch, mode, device) for count in (few, more))
            seconds = short + (depth - few) * max(long - short, 0.0) / max(1, more - few)
        found[mode] = seconds / batch.input_ids.shape[1]
    reference = found.pop("reference", 0.0)
    found = {mode: seconds + reference for mode, seconds in found.items()}
    weights = torch.nn.Parameter(torch.randn(32_000_000, device=device))  # more than caches hold
    weights.grad = torch.randn_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)
    # beside the optimizer DeepSpeed reads and writes as much again: norms, clipping, copies to and from its flat buffers
    found["update"] = 2 * _median(optimizer.step) / len(weights)
    if store:
        found["sent"] = _median(lambda: dist.all_reduce(weights.grad)) / (2 * (planner.ranks - 1) / planner.ranks * 4 * len(weights))
        dist.destroy_process_group()
    return found


def _seconds_of(planner: Planner, depth: int, batch: data.MicroBatch, mode: str, device: torch.device) -> float:
    """Of forward and backward with a way of checkpointing activations, of a model with random weights and so many layers."""
    config = type(planner.config).from_dict({**planner.config.to_dict(), "num_hidden_layers": depth, "layer_types": None})
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=planner.dtype).train()
    name, _ = attention.choose(planner.recipe.kernels, device, planner.dtype, 0.0, config)
    layers.choose(model, planner.recipe.kernels, compiled=False)
    policy = Policy(model, name)
    policy.head.choose(planner.recipe.kernels)
    if mode != "reference":
        checkpoint_activations(model, mode)
        return _median(lambda: policy(batch).sum().backward())
    with torch.no_grad():
        return _median(lambda: policy(batch))


def _median(action, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        if dist.is_initialized():
            dist.barrier()
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
    if planner.seconds:
        lines.append("how sure  the layers were timed here; how near six runs on a CPU came: benchmarks/results/plan_cpu_float32.json")
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
    if options.gpu == "here":
        time_here(planner)
    stages = STAGES if options.nodes == 1 else (*STAGES, "zeropp")
    shown = [(stage, mode) for stage in stages for mode in CHECKPOINTING if stage != "zero3_offload" or mode == "full"]
    print(report(planner, [planner.plan(*way) for way in shown]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
