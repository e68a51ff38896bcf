"""Worker of test_plan.py, started by the deepspeed launcher: bytes that a rank sends in a step, counted, beside what the planner says.

sent.py TINY FILE      FILE: {"KIND, ZERO, DTYPE, micro-batches": {"counted": bytes by collective, "planned": bytes}}
"""

import json
import sys
import weakref
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import build_training  # noqa: E402
from torch import distributed as dist  # noqa: E402

from benchmarks.collectives import Counting  # noqa: E402
from posttrain.engine import build as engine_build  # noqa: E402
from posttrain.engine import ds_config, shards  # noqa: E402
from posttrain.parallel.script import run_script  # noqa: E402
from posttrain.planning import planner  # noqa: E402
from posttrain.planning.machines import this_machine  # noqa: E402
from posttrain.planning.memory import Zero  # noqa: E402
from posttrain.training import build  # noqa: E402
from posttrain.training.step import train_step  # noqa: E402

WAYS = [
    *[("sft", zero, dtype, tokens) for zero in ("zero0", "zero1", "zero2") for dtype, tokens in (("float32", 64), ("bfloat16", 512))],
    *[("sft", zero, "bfloat16", tokens) for zero in ("zero3", "zero3, little kept") for tokens in (64, 512)],
    ("dpo", "zero2", "bfloat16", 512),
    ("dpo", "zero3, little kept", "bfloat16", 512),
]


def read_ds_config(path: str, keep: bool) -> dict:
    """As ds_config.read_ds_config; at ZeRO-3 a tiny model's matrices stay partitioned as a large one's do, by default they would not."""
    config = read_from_file(path)
    section = config["zero_optimization"]
    if section["stage"] == 3:
        section["stage3_param_persistence_threshold"] = 0
        section |= {} if keep else {"stage3_max_reuse_distance": 12000, "stage3_prefetch_bucket_size": 0}
    return config


read_from_file = ds_config.read_ds_config


def sent() -> None:
    tiny, file = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    found = {}
    for kind, zero, dtype, tokens in WAYS:
        build.read_ds_config = engine_build.read_ds_config = planner.read_ds_config = partial(read_ds_config, keep="little" not in zero)
        path = f"ds_configs/{zero.partition(',')[0]}.json"
        settings = {"max_iters": 4, "global_batch_size": 8, "max_tokens_per_gpu": tokens, "dtype": dtype, "ds_config": path}
        training = build_training(tiny, kind, {"out_dir": "unused", **settings})
        for step in (1, 2):  # make what the first steps make; ZeRO-3 learns the order of layers
            train_step(training, step)
        training.engine.set_learning_rate(1e-3)
        with Counting() as counting:
            train_step(training, 3)
        micro_batches = len(training.share(3).micro_batches)
        made = planner.Planner(training.recipe, this_machine(1), dist.get_world_size(), 1)
        planned = made.sent(Zero.of(planner.read_ds_config(path)), micro_batches)
        found[f"{kind}, {zero}, {dtype}, {micro_batches} micro-batches"] = {"counted": counting.sent, "planned": planned}
        policy, masters = training.engine.module, [weakref.ref(master) for master in shards.master_weights(training.engine)[0]]
        training.engine.free()
        left = [master() for master in masters] + [getattr(parameter, "ds_tensor", parameter) for parameter in policy.parameters()]
        assert masters and not sum(tensor.untyped_storage().nbytes() for tensor in left if tensor is not None), "memory is not given back"
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found, indent=2))


run_script(sent)
