"""Worker of test_checkpoint.py, started by the deepspeed launcher: saves training states, and goes on from them in other layouts.

relayout.py save FOLDER      after 2 steps in every layout, then 2 more: FOLDER/DTYPE_ZERO/ and FOLDER/DTYPE_ZERO.json
relayout.py load FOLDER      from each of those into others, on as many ranks into the same: FOLDER/loaded_RANKS.json
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import build_training  # noqa: E402
from torch import distributed as dist  # noqa: E402

from posttrain.engine.checkpoints import Checkpoints  # noqa: E402
from posttrain.engine.start import start_distributed  # noqa: E402
from posttrain.engine.weights import gathered_state_dict  # noqa: E402
from posttrain.parallel.script import run_script  # noqa: E402
from posttrain.training.start_checks import check_start  # noqa: E402
from posttrain.training.step import train_step  # noqa: E402

LAYOUTS = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
SAVED_ON = 2  # ranks
RECIPE = {"out_dir": "unused", "max_iters": 4, "global_batch_size": 8, "learning_rate": 1e-2, "max_tokens_per_gpu": 80, "grad_clip": 0.3}


def build(folder: Path, dtype: str, zero: str, source: str):
    """A training in layout `zero`, and the checkpoints of layout `source`."""
    training = build_training(f"{folder}/tiny", "sft", {**RECIPE, "dtype": dtype, "ds_config": f"ds_configs/{zero}.json"})
    return training, Checkpoints(training.engine, folder / f"{dtype}_{source}", 2, print, {})


def steps(training, first: int, last: int) -> dict:
    """Losses, gradient norms and a hash of the weights after it."""
    curve = []
    for step in range(first, last + 1):
        training.engine.set_learning_rate(RECIPE["learning_rate"])
        metrics, reason, *_ = train_step(training, step)
        assert reason is None, reason
        curve.append([metrics["loss"], metrics["grad_norm"]])
    if any(parameter.grad is not None for parameter in training.engine.module.parameters()):
        assert training.engine.zero_stage == 0, "a gradient was kept beside the sum that it is added to"
    state = gathered_state_dict(training.engine) or {}
    digest = hashlib.sha256(b"".join(tensor.float().numpy().tobytes() for tensor in state.values())).hexdigest()
    return {"curve": curve, "weights": digest}


def save(folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        for zero in LAYOUTS:
            training, checkpoints = build(folder, dtype, zero, zero)
            steps(training, 1, 2)
            checkpoints.save(2, training.guard.state())
            checkpoints.finish()
            result = steps(training, 3, 4)
            if dist.get_rank() == 0:
                (folder / f"{dtype}_{zero}.json").write_text(json.dumps(result))


def targets(dtype: str, source: str) -> list[str]:
    """Where to go on: into the same layout, or on other ranks into every one in float32 and two in bfloat16."""
    if dist.get_world_size() == SAVED_ON:
        return [source]
    place = LAYOUTS.index(source)
    return list(LAYOUTS) if dtype == "float32" else [LAYOUTS[place - 1], LAYOUTS[place - 3]]


def load(folder: Path) -> None:
    results = []
    start_distributed()
    for dtype in ("float32", "bfloat16"):
        for source in LAYOUTS:
            for zero in targets(dtype, source):
                training, checkpoints = build(folder, dtype, zero, source)
                check_start(training)  # as a run does: its forward passes leave parameters gathered at ZeRO-3
                assert checkpoints.restore(checkpoints.newest()) == 2
                results.append({"dtype": dtype, "from": source, "to": zero, **steps(training, 3, 4)})
    if dist.get_rank() == 0:
        (folder / f"loaded_{dist.get_world_size()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    what, place = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    run_script(lambda: {"save": save, "load": load}[what](Path(place)))
