"""Worker of test_compile.py, started by the deepspeed launcher: a compiled model in KIND and ZERO trains and validates.

compiled.py FOLDER KIND ZERO     prints graphs and breaks after a step and a validation, and after more of other lengths
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import build_training  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from posttrain import engine as engines  # noqa: E402
from posttrain.run import main  # noqa: E402
from posttrain.step import evaluate, train_step  # noqa: E402

RECIPE = {"out_dir": "unused", "max_iters": 6, "global_batch_size": 8, "learning_rate": 1e-2, "max_tokens_per_gpu": 160, "compile": True}


def work(folder: Path, kind: str, zero: str) -> None:
    training = build_training(str(folder), kind, {**RECIPE, "dtype": "bfloat16", "ds_config": f"ds_configs/{zero}.json"})
    seen, lengths = [], set()
    for steps in ((1, 2), (3, 4, 5, 6)):
        for step in steps:
            engines.set_learning_rate(training.engine, 1e-2)
            assert train_step(training, step)[1] is None
        evaluate(training)
        seen.append({"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())})
    lengths = {int(n) for n in training.data.train.lengths}
    if dist.get_rank() == 0:
        print("seen " + json.dumps({"first": seen[0], "then": seen[1], "lengths": len(lengths)}), flush=True)


if __name__ == "__main__":
    place, what, how = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    main(lambda: work(Path(place), what, how))
