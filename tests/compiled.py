"""Worker of test_compile.py, started by the deepspeed launcher: models train and validate, compiled and not.

compiled.py FOLDER     for each case prints the graphs and breaks after the first steps, and after more of other lengths; and the curves
"""

import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny import build_training  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from posttrain.parallel.script import run_script  # noqa: E402
from posttrain.training.step import evaluate, train_step  # noqa: E402

RECIPE = {"out_dir": "unused", "max_iters": 6, "global_batch_size": 8, "learning_rate": 1e-2, "max_tokens_per_gpu": 160, "dtype": "float32"}


# The layer's graph becomes C++ in the first case only, which takes most of the time; which graphs there are, and whether they break, shows
# without: torch's backend aot_eager runs them as they are.
CASES = [("sft", "zero1", "inductor"), ("sft", "zero3", "aot_eager"), ("dpo", "zero3", "aot_eager")]
compile_by = torch.compile


def work(folder: Path, kind: str, zero: str, backend: str) -> dict:
    torch.compile = functools.partial(compile_by, backend=backend)
    curves, seen, before = {}, [], dict(counters["stats"])
    for compiled in (False, True):
        training = build_training(str(folder), kind, {**RECIPE, "compile": compiled, "ds_config": f"ds_configs/{zero}.json"})
        curve = curves[compiled] = []
        for steps in ((1, 2), (3, 4, 5, 6)):
            for step in steps:
                training.engine.set_learning_rate(RECIPE["learning_rate"])
                metrics, reason, *_ = train_step(training, step)
                assert reason is None
                curve += [metrics["loss"], metrics["grad_norm"]]
            curve.append(evaluate(training)[0]["loss"])
            graphs = counters["stats"]["unique_graphs"] - before.get("unique_graphs", 0)
            seen.append({"graphs": graphs, "breaks": sum(counters["graph_break"].values())})
    lengths = len({int(n) for n in training.data.train.lengths})
    facts = {"first": seen[2], "then": seen[3], "lengths": lengths, "plain": curves[False], "compiled": curves[True]}
    return {"case": f"{kind} {zero}", **facts}


def every_case(folder: Path) -> None:
    results = [work(folder, *case) for case in CASES]
    if dist.get_rank() == 0:
        print("seen " + json.dumps(results), flush=True)


if __name__ == "__main__":
    place = next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank="))
    run_script(lambda: every_case(Path(place)))
