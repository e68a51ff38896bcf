"""The table that plan.py prints: an estimate for each way to run, and the way that it recommends."""

import torch

from posttrain.planning.activations import possible_ways
from posttrain.planning.machines import Device
from posttrain.planning.planner import CHECKPOINTING, STAGES, Estimate, Planner
from posttrain.planning.timing import time_here
from posttrain.recipes.keys import Recipe


def table(recipe: Recipe, device: Device, *, gpus: int, nodes: int, assumed: str | None, here: bool) -> str:
    """Return the estimates for `gpus` ranks on each of `nodes`; `assumed` is a model's shape, `here` whether to time this machine."""
    planner = Planner(recipe, device, gpus, nodes, assumed)
    modes, stages = possible_ways(planner.config, CHECKPOINTING), STAGES if nodes == 1 else (*STAGES, "zeropp")
    if not planner.on_gpu:  # there is nothing to offload from
        stages = [stage for stage in stages if stage != "zero3_offload"]
    if here:
        time_here(planner, modes, stages)
    shown = [(stage, mode) for stage in stages for mode in modes if stage != "zero3_offload" or mode == "full"]
    return report(planner, [planner.estimate(*way) for way in shown])


def best(estimates: list[Estimate], dtype: torch.dtype) -> Estimate | None:
    """Return the first estimate that is within 5 % of the fastest that fits; None where none fits.

    Those that fit at least half of the recipe's micro-batch come before all others. ZeRO-0 is left out in bfloat16, in which it adds up
    gradients and so is less exact.
    """
    fitting = [one for one in estimates if one.most_tokens and (one.ds_config != "zero0" or dtype == torch.float32)]
    fitting = [one for one in fitting if one.most_tokens >= one.tokens / 2] or fitting
    fastest = min((one.step_seconds for one in fitting), default=0.0)
    return next((one for one in fitting if one.step_seconds <= 1.05 * fastest), None)


def report(planner: Planner, estimates: list[Estimate]) -> str:
    """Return what plan.py prints: model, data and run, a table with a row an estimate, and the way to run that it recommends."""
    device, recipe = planner.device, planner.recipe
    lines = [
        f"model     {planner.model_summary}, {planner.count:,} parameters",
        f"data      {planner.work_summary}",
        f"run       {planner.steps:,} steps of {planner.batch:,} examples on {planner.ranks} x {device.name}",
        "",
        f"GB (10^9 bytes) of each rank's {device.memory / 1e9:.0f} ({planner.usable / 1e9:.0f} usable), micro-batches of "
        f"{estimates[0].tokens:,} tokens",
        "",
        f"{'ds_config':14}{'activations':>13}{'weights':>9}{'grads':>7}{'optim.':>8}{'buffers':>9}{'activ.':>8}{'head':>6}{'ref.':>6}{'total':>8}"
        f"{'most tokens':>13}{'s/step':>8}{'sent':>8}",
    ]
    for one in estimates:
        p = one.parts
        numbers = [p.weights, p.gradients, p.optimizer, p.buffers, p.activations, p.head, p.reference, p.total]
        widths = (9, 7, 8, 9, 8, 6, 6, 8)
        row = "".join(f"{value / 1e9:>{width}.1f}" for value, width in zip(numbers, widths, strict=True))
        fits = f"{one.most_tokens:>13,}{one.step_seconds:>8.2f}{one.sent / 1e9:>8.1f}" if one.most_tokens else f"{'does not fit':>29}"
        lines.append(f"{one.ds_config:14}{one.checkpointing:>13}{row}{fits}")
    chosen = best(estimates, planner.dtype)
    if chosen is None:
        more = "take more GPUs, or a ds_config that offloads (zero3_offload)" if planner.on_gpu else "take a machine with more memory"
        lines += ["", f"nothing fits into {planner.usable / 1e9:.0f} GB: {more}"]
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
        lines.append(
            "accuracy  layers and engines were timed here; benchmarks/results/plan_cpu.json has six such estimates beside real runs"
        )
        if recipe.compile:
            lines.append("          compile, which makes layers faster, was not timed")
    else:
        lines.append(
            "accuracy  memory: within 4 % of two runs on one H200; time: assumes the share of peak FLOP/s that it reached with 1.7B\n"
            "          parameters; other GPUs, other sizes and communication between GPUs were not measured"
        )
    return "\n".join(lines)


def _duration(hours: float) -> str:
    """Return a time as text, in hours or, below one, in minutes."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
