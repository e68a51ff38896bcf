"""The table that plan.py prints: an estimate for each way to run, and the way that it recommends."""

import math
from pathlib import Path

from posttrain.planning.machines import Device, free_on_host
from posttrain.planning.planner import OFFLOADED, ZERO0, Planner, Way
from posttrain.planning.timing import time_here
from posttrain.recipes.keys import Recipe


def table(recipe: Recipe, device: Device, *, gpus: int, nodes: int, assumed: str | None, here: bool) -> str:
    """Return the estimates for `gpus` ranks on each of `nodes`; `assumed` is a model's shape, `here` whether to time this machine."""
    planner = Planner(recipe, device, gpus, nodes, assumed)
    ways = planner.ways()
    if here:
        planner.host = free_on_host()
        time_here(planner, *(list(dict.fromkeys(way[part] for way in ways)) for part in (1, 0)))
    return report(planner, ways)


def report(planner: Planner, ways: list[Way]) -> str:
    """Return what plan.py prints: model, data and run, a table with a row for each way to run, and the one that it recommends."""
    device, recipe, estimates = planner.device, planner.recipe, [planner.estimate(way) for way in ways]
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
        lines.append(f"{Path(one.way.ds_config).stem:14}{one.way.checkpointing:>13}{row}{fits}")
    if planner.on_gpu:
        free = f", of which {planner.host / 1e9:,.0f} GB are free" if math.isfinite(planner.host) else ""
        read, kept = planner.dtype.itemsize * planner.count / 1e9, planner.on_host(OFFLOADED) / 1e9
        lines += [
            "",
            f"host      rank 0 reads the model into {read:,.0f} GB of memory; zero3_offload keeps {kept:,.0f} GB on each node{free}",
        ]
    recommended = [way for way in ways if way.ds_config != ZERO0]
    best = planner.best(recommended)
    if best is None:
        lines += ["", f"nothing fits into {planner.usable / 1e9:.0f} GB: {planner.smallest_change(recommended)}"]
    else:
        chosen = next(one for one in estimates if one.way == best)
        hours = chosen.step_seconds * planner.steps / 3600
        tokens = planner.work.lengths.mean() * planner.batch / chosen.step_seconds
        lines += [
            "",
            f"take      --ds_config={chosen.way.ds_config} --activation_checkpointing={chosen.way.checkpointing} "
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
