"""What a recipe will take, before it runs: memory of each GPU by part, the largest micro-batch, time, communication, and which ds_config.

python posttrain/plan.py RECIPE.yaml [--gpus=8] [--nodes=1] [--gpu=b200|b300|h200|h100|a100|here] [--model=1.8b|8b|32b|70b] [--key=value]

Where the recipe's model or data is not there yet, --model's shape and rows of 2,048 tokens are assumed, and said to be. `here` times the
model's own layers, and DeepSpeed's engines around them, on this machine; for other GPUs times come from the share of its peak that one H200
reached.
"""

import argparse
import sys

import torch

from posttrain.planning.machines import GPUS, this_machine
from posttrain.planning.planner import CHECKPOINTING, STAGES, Plan, Planner
from posttrain.planning.timing import time_here
from posttrain.planning.work import SHAPES
from posttrain.recipes.reading import load_recipe_of_either_kind


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
        lines.append("how sure  layers and engines were timed here; how near six runs on a CPU came: benchmarks/results/plan_cpu.json")
        if recipe.compile:
            lines.append("          without compile, which makes them faster by what was not timed")
    else:
        lines.append(
            "how sure  memory: within 4 % of two runs on one H200; time: by the share of its peak that it reached with 1.7B parameters,\n"
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
    here = options.gpu == "here"
    if here and options.nodes > 1:
        raise ValueError(f"--gpu=here times this machine alone, saw --nodes={options.nodes}: leave it out, or name the GPU")
    planner = Planner(recipe, this_machine(options.gpus) if here else GPUS[options.gpu], options.gpus, options.nodes, options.model)
    stages = STAGES if options.nodes == 1 else (*STAGES, "zeropp")
    if not planner.on_gpu:  # there is nothing to offload from
        stages = [stage for stage in stages if stage != "zero3_offload"]
    if here:
        time_here(planner, CHECKPOINTING, stages)
    shown = [(stage, mode) for stage in stages for mode in CHECKPOINTING if stage != "zero3_offload" or mode == "full"]
    print(report(planner, [planner.plan(*way) for way in shown]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
