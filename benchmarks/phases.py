# ruff: noqa: E402
"""Where the time of a step goes: python benchmarks/phases.py [--race cpu|gpu|dry]        writes results/phases_RACE.json

SFT of sft.py's races on one rank: seconds in data, forward, backward, optimizer and logging, with the device synchronized between them;
and, in other steps, the kernels that take most of the time, by torch's profiler, and how fast matrix products are beside a large one.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tiny import build_training

from benchmarks.sft import RACES, WITH_ROOM
from benchmarks.side_by_side import RESULTS, machine, make_world, suffix, versions
from posttrain.engine.update import TrainingEngine
from posttrain.objectives.likelihood import SFT
from posttrain.run.directory import Run
from posttrain.run.health import Facts
from posttrain.training.state import Ahead
from posttrain.training.step import train_step

WARM, TIMED, PROFILED = 3, 8, 3
KERNELS = 25
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def timed(spent: Counter, phase: str, owner, name: str) -> None:
    """Replace a function by one that counts its seconds under `phase`."""
    function = getattr(owner, name)

    def wrapper(*arguments, **settings):
        started = _now()
        try:
            return function(*arguments, **settings)
        finally:
            spent[phase] += _now() - started

    setattr(owner, name, wrapper)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(race, folder: Path) -> dict:
    """Seconds of each phase and shares of the kernels, in one race."""
    make_world(race, folder)
    recipe = {"out_dir": str(folder / "run"), "max_iters": 99, "global_batch_size": race.batch, "learning_rate": 1e-5, "dtype": race.dtype}
    on_gpu = torch.cuda.is_available()
    training = build_training(str(folder), "sft", recipe | {"ds_config": race.ds_config} | (WITH_ROOM if on_gpu else {}))
    run = Run(training.recipe, 0, {})
    manifest, facts = training.data.manifest, Facts(1, 1, 0, 1.0, 1.0)
    run.start(1, 99, describe_model=lambda folder: None, manifest=manifest, facts=facts, states={})
    run.step_line = lambda *_: None

    def one(step: int) -> None:
        metrics = train_step(training, step).metrics
        run.log(step, "train", metrics | {"learning_rate": 1e-5})

    for step in range(1, WARM + 1):
        one(step)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities, with_flops=True) as profiler:
        for step in range(WARM + 1, WARM + PROFILED + 1):
            one(step)
    events = profiler.key_averages()
    if on_gpu:  # kernels; the operators that start them count the same time once more
        cost = {event.key: event.self_device_time_total for event in events if event.device_type == torch.autograd.DeviceType.CUDA}
    else:
        cost = {event.key: event.self_cpu_time_total for event in events}
    total = sum(cost.values())
    products = [event for event in events if event.key in PRODUCTS and event.flops]
    spent_in = sum(event.device_time_total if on_gpu else event.self_cpu_time_total for event in products) * 1e-6
    rates = {"in_a_step": sum(event.flops for event in products) / spent_in, "one_large_product": rate_of_a_product(race.dtype, on_gpu)}
    kernels = {name[:90]: round(value / total, 4) for name, value in Counter(cost).most_common(KERNELS)}

    spent, whole = Counter(), []
    places = {
        "data": (Ahead, "get"),
        "forward": (SFT, "loss"),
        "backward": (TrainingEngine, "backward"),
        "optimizer": (TrainingEngine, "update"),
    }
    for phase, place in (places | {"logging": (Run, "log")}).items():
        timed(spent, phase, *place)
    for step in range(WARM + PROFILED + 1, WARM + PROFILED + TIMED + 1):
        started = _now()
        one(step)
        whole.append(_now() - started)
    shares = {phase: round(seconds / sum(whole), 4) for phase, seconds in spent.items()}
    shares["the rest"] = round(1 - sum(shares.values()), 4)
    rates = {name: round(rate / 1e9, 1) for name, rate in rates.items()}
    return {
        "step_seconds": round(statistics.median(whole), 4),
        "share_of_a_step": shares,
        "gflops_of_products": rates,
        "share_of_device_time": kernels,
    }


def rate_of_a_product(dtype: str, on_gpu: bool) -> float:
    """FLOP/s of a product of square matrices, the fastest of several: about what the device can do."""
    size = 8192 if on_gpu else 1024
    one = torch.randn(size, size, dtype=getattr(torch, dtype), device="cuda" if on_gpu else "cpu")
    fastest = math.inf
    for _ in range(20):
        started = _now()
        torch.mm(one, one)
        fastest = min(fastest, _now() - started)
    return 2 * size**3 / fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--race", default="cpu", choices=RACES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="posttrain_phases_") as folder:
        result = {"machine": machine(), "versions": versions()} | measure(RACES[options.race], Path(folder))
    text = json.dumps(result, indent=2) + "\n"
    (RESULTS / f"phases_{options.race}{suffix(RACES[options.race].dtype)}.json").write_text(text, encoding="utf-8")
    print(text, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
