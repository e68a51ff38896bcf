"""Worker of test_samples.py, started by the deepspeed launcher: greedy answers of the tiny model, in several layouts.

sampled.py TINY FILE ASKED
ASKED: a file with JSON of prompts, most tokens and stop tokens; FILE gets {layout: [ids with the token that ended them, ...]}
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import build_training  # noqa: E402
from torch import distributed as dist  # noqa: E402

from posttrain.parallel.script import run_script  # noqa: E402
from posttrain.training.samples import Asked, generate  # noqa: E402
from posttrain.training.step import train_step  # noqa: E402

WAYS = {
    "zero1": {"ds_config": "ds_configs/zero1.json"},
    "zero3": {"ds_config": "ds_configs/zero3.json"},
    "zero3, recomputed": {"ds_config": "ds_configs/zero3.json", "activation_checkpointing": "full"},
}


def sampled() -> None:
    tiny, file, asked = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    prompts, most, stops = json.loads(Path(asked).read_text())
    found = {}
    for name, settings in WAYS.items():
        common = {"out_dir": "unused", "max_iters": 4, "global_batch_size": 8, "max_tokens_per_gpu": 400, "dtype": "float32"}
        training = build_training(tiny, "sft", common | settings)
        asked_for = [Asked(prompt, most, lambda answer: answer[-1] in stops) for prompt in prompts]
        training.engine.eval()
        found[name] = generate(training, asked_for)
        found[f"{name}, few"] = generate(training, asked_for[:1])  # fewer prompts than ranks
        training.recipe = (recipe := training.recipe).model_copy(update={"max_tokens_per_gpu": 30})  # one or two prompts at a time
        found[f"{name}, narrow"] = generate(training, asked_for)
        training.recipe = recipe
        training.engine.train()
        metrics = train_step(training, 1).metrics  # it still trains
        found[f"{name}, loss"] = metrics["loss"]
        training.engine.free()
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))


run_script(sampled)
