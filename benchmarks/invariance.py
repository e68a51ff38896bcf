"""One curve for every layout: SFT and DPO of a tiny model in every pair of settings that must not change the numbers.

    python benchmarks/invariance.py --all        the whole grid, into benchmarks/results/invariance.json and invariance.md
    python benchmarks/invariance.py --small      the part that the tests run; --out FOLDER says where to

A cell is one run of a real DeepSpeed engine under the real launcher; all cells of a number of ranks share one launch. The grid is a
pairwise covering array: every setting meets every other setting in some cell. Each cell is compared with the plainest one of its kind and
dtype: one rank, ZeRO-0 (in bfloat16 ZeRO-1, see ds_configs/README.md), one example a micro-batch, nothing shared, recomputed or compiled.
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # instead of benchmarks/, whose data_prep.py would be taken for the package
sys.path.append(str(ROOT / "tests"))

FACTORS = {
    "dtype": ["float32", "bfloat16"],
    "ranks": [1, 2, 3, 4],
    "zero": ["zero0", "zero1", "zero2", "zero3", "zero3_offload"],
    "max_tokens_per_gpu": [160, 400, 4096],  # of steps of some 500: several micro-batches, or one
    "packing": [True, False],
    "activation_checkpointing": ["none", "selective", "full"],
    "compile": [False, True],
}
SMALL = {"dtype": ["float32", "bfloat16"], "ranks": [1, 2, 3], "zero": ["zero0", "zero2", "zero3"], "max_tokens_per_gpu": [160, 4096]}
SMALL |= {"packing": [True, False], "activation_checkpointing": ["none", "full"], "compile": [False]}
DPO_FACTORS = {"share_prompt": [True, False], "reference": ["beside", "precompute"]}
PLAINEST = {"ranks": 1, "max_tokens_per_gpu": 4096, "packing": False, "activation_checkpointing": "none", "compile": False}
RECIPE = {
    "out_dir": "unused",
    "global_batch_size": 9,  # a multiple of nothing
    "learning_rate": 1e-3,
    "grad_clip": 0.5,
    "seed": 3,
}
# The largest difference allowed from the plainest cell: of a loss, gradient norm or metric (but not an accuracy, which leaps where two
# rewards are nearly tied) relative to 1 or its value; of a final weight absolute; and of the losses' mean over the steps, with its sign:
# rounding goes both ways, a wrong factor one way.
BOUNDS = {
    "float32": {"loss": 1e-5, "grad_norm": 1e-5, "validation": 1e-5, "weights": 1e-5, "drift": 5e-7},
    "bfloat16": {"loss": 3e-3, "grad_norm": 2e-2, "validation": 3e-3, "weights": 1.6e-2, "drift": 5e-4},  # two rounding steps of a 1
}


def covering_array(factors: dict[str, list], seed: int) -> list[dict]:
    """Cells in which every two values of different factors occur together at least once; greedy, each the best of many random cells."""
    draw, names = random.Random(seed), list(factors)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    cells = []
    while missing:
        (a, x), (b, y) = min(missing, key=str)
        best, most = {}, -1
        for _ in range(200):
            cell = {name: draw.choice(values) for name, values in factors.items()} | {a: x, b: y}
            met = sum(pair in missing for pair in itertools.combinations(cell.items(), 2))
            if met > most:
                best, most = cell, met
        missing -= set(itertools.combinations(best.items(), 2))
        cells.append(best)
    return cells


def grid(small: bool) -> list[dict]:
    """All cells, the plainest of each kind and dtype first."""
    cells = []
    for kind in ("sft", "dpo"):
        extra = DPO_FACTORS if kind == "dpo" else {}
        for dtype in FACTORS["dtype"]:
            plainest = {"zero": "zero0" if dtype == "float32" else "zero1", "dtype": dtype, **PLAINEST}
            cells.append({"kind": kind, **plainest, **({"share_prompt": False, "reference": "beside"} if extra else {})})
        cells += [{"kind": kind, **cell} for cell in covering_array((SMALL if small else FACTORS) | extra, seed=1)]
    return cells


def run_cell(cell: dict, tiny: str, steps: int) -> dict:
    """Run a cell and return its numbers; on rank 0 also its final weights. All ranks."""
    from tiny import build_training

    from posttrain.engine.weights import gathered_state_dict
    from posttrain.training.start_checks import check_start
    from posttrain.training.step import evaluate, train_step

    settings = {name: value for name, value in cell.items() if name not in ("kind", "ranks", "zero")}
    settings |= RECIPE | {"max_iters": steps, "ds_config": f"ds_configs/{cell['zero']}.json"}
    if cell["kind"] == "dpo":
        settings |= {"chosen_nll_weight": 0.3, "ld_alpha": 0.7}
    training, curve = build_training(tiny, cell["kind"], settings), []
    recipe, engine = training.recipe, training.engine
    start = check_start(training)
    for step in range(1, steps + 1):
        engine.set_learning_rate(recipe.learning_rate)
        metrics, reason, *_ = train_step(training, step)
        assert reason is None, reason
        curve.append(metrics)
    return {"curve": curve, "validation": evaluate(training)[0], "start": start, "weights": gathered_state_dict(engine)}


def worker(folder: Path, ranks: int) -> None:
    """Run this launch's cells, one after another. All ranks."""
    from safetensors.torch import save_file
    from torch import distributed as dist

    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    for number, cell in enumerate(plan["cells"]):
        if cell["ranks"] != ranks:
            continue
        started = time.monotonic()
        result = run_cell(cell, str(folder / "tiny"), plan["steps"])
        if dist.get_rank() == 0:
            save_file({name: tensor.float() for name, tensor in result.pop("weights").items()}, folder / f"{number}.safetensors")
            result["seconds"] = time.monotonic() - started
            (folder / f"{number}.json").write_text(json.dumps(result), encoding="utf-8")
            print(f"  cell {number}: {describe(cell)} {result['seconds']:.0f} s", flush=True)


def launch(folder: Path, ranks: int) -> None:
    """Run all cells of this number of ranks in one launch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--num_gpus", str(ranks)]
    command += ["--master_port", str(port), __file__, "--worker", str(folder)]
    subprocess.run(command, check=True, env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | os.environ)


def describe(cell: dict) -> str:
    """A cell in a few words."""
    words = {"packing": {True: "packed", False: "one each"}, "compile": {True: "compiled", False: ""}}
    words |= {
        "share_prompt": {True: "prompt shared", False: "prompt twice"},
        "reference": {"beside": "beside", "precompute": "precomputed"},
    }
    words |= {"activation_checkpointing": {"none": "", "selective": "selective", "full": "full"}}
    names = ("kind", "dtype", "ranks", "zero", "max_tokens_per_gpu", *words)
    texts = {"ranks": f"{cell['ranks']} ranks", "max_tokens_per_gpu": f"{cell['max_tokens_per_gpu']} tokens"}
    return ", ".join(text for n in names if n in cell and (text := texts.get(n) or words.get(n, {}).get(cell[n], str(cell[n]))))


def differences(result: dict, plainest: dict, weights: dict, plainest_weights: dict) -> dict[str, float]:
    """The largest difference of each kind of BOUNDS between a cell's result and the plainest one's."""

    def relative(mine: float, right: float) -> float:
        return (mine - right) / max(1.0, abs(right))

    def largest(values) -> float:
        return max(abs(value) if math.isfinite(value) else math.inf for value in values)

    steps = list(zip(result["curve"], plainest["curve"], strict=True))
    losses = [name for name in result["curve"][0] if name not in ("grad_norm", "rewards/accuracies")]
    validation = [name for name in result["validation"] if name != "rewards/accuracies"]
    return {
        "loss": largest(relative(mine[name], right[name]) for mine, right in steps for name in losses),
        "grad_norm": largest(relative(mine["grad_norm"], right["grad_norm"]) for mine, right in steps),
        "validation": largest(relative(result["validation"][name], plainest["validation"][name]) for name in validation),
        "weights": largest((weights[name] - right).abs().max().item() for name, right in plainest_weights.items()),
        "drift": abs(sum(relative(mine["loss"], right["loss"]) for mine, right in steps)) / len(steps),
    }


def compare(folder: Path, cells: list[dict]) -> list[dict]:
    """Compare each cell with the plainest of its kind and dtype: its differences, and whether they are within the bounds."""
    from safetensors.torch import load_file

    rows, plainest = [], {}
    for number, cell in enumerate(cells):
        result, weights = json.loads((folder / f"{number}.json").read_text(encoding="utf-8")), load_file(folder / f"{number}.safetensors")
        right = plainest.setdefault((cell["kind"], cell["dtype"]), (result, weights))
        found = differences(result, right[0], weights, right[1])
        exceeded = [name for name, bound in BOUNDS[cell["dtype"]].items() if not found[name] <= bound]
        ends = {"first_loss": result["curve"][0]["loss"], "last_loss": result["curve"][-1]["loss"]}
        rows.append({**cell, "differences": found, "exceeded": exceeded, "start": result["start"], **ends})
    return rows


def table(rows: list[dict], facts: dict) -> str:
    """The result as Markdown."""
    names = list(BOUNDS["float32"])
    packages = ", ".join(f"{name} {value}" for name, value in facts["packages"].items())
    lines = [
        "# One curve for every layout",
        "",
        f"`{facts['command']}`: {len(rows)} cells of {facts['steps']} steps; the largest differences from the plainest "
        f"cell of the same kind and dtype, which is the first of each. {facts['machine']}; {packages}.",
        "",
        f"| cell | {' | '.join(names)} | |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for dtype, bounds in BOUNDS.items():
        lines.append(f"| bound in {dtype} | " + " | ".join(f"{bounds[name]:.0e}" for name in names) + " | |")
    for row in rows:
        values = " | ".join(f"{row['differences'][name]:.1e}" for name in names)
        lines.append(f"| {describe(row)} | {values} | {'over: ' + ', '.join(row['exceeded']) if row['exceeded'] else ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--all", action="store_true", help="the whole grid, 20 steps a cell")
    size.add_argument("--small", action="store_true", help="a smaller one, 6 steps a cell")
    size.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder for the result files; with --all by default benchmarks/results")
    arguments = parser.parse_args()
    if arguments.small and not arguments.out:
        parser.error("--small needs --out FOLDER: benchmarks/results holds what --all measured")
    out = arguments.out or ROOT / "benchmarks" / "results"
    out.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        worker(arguments.worker, int(os.environ["WORLD_SIZE"]))
        return

    from tiny import make_tiny

    cells, steps = grid(arguments.small), 6 if arguments.small else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        make_tiny(folder / "tiny")
        (folder / "plan.json").write_text(json.dumps({"cells": cells, "steps": steps}), encoding="utf-8")
        for ranks in sorted({cell["ranks"] for cell in cells}):
            print(f"{ranks} ranks: {sum(cell['ranks'] == ranks for cell in cells)} cells", flush=True)
            launch(folder, ranks)
        rows = compare(folder, cells)
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    command = f"python benchmarks/invariance.py {'--small' if arguments.small else '--all'}"
    facts = {"command": command, "steps": steps, "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores", "packages": packages}
    (out / "invariance.json").write_text(json.dumps({**facts, "bounds": BOUNDS, "cells": rows}, indent=1) + "\n", encoding="utf-8")
    (out / "invariance.md").write_text(table(rows, facts), encoding="utf-8")
    print(table(rows, facts))
    if over := [row for row in rows if row["exceeded"]]:
        sys.exit(f"{len(over)} of {len(rows)} cells exceed their bounds")


if __name__ == "__main__":
    main()
