"""Worker of test_export.py, on two ranks: trains bases of several kinds, and writes each result as a run does.

New memory is filled with NaN, so that what is read without having been written is seen.

exported.py FOLDER      FOLDER/NAME/base -> FOLDER/NAME/final, FOLDER/NAME/model (made of a checkpoint), FOLDER/NAME/trained.pt
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny import build_training  # noqa: E402
from torch import distributed as dist  # noqa: E402

from posttrain.engine.checkpoints import Checkpoints  # noqa: E402
from posttrain.engine.weights import gathered_state_dict  # noqa: E402
from posttrain.model import export  # noqa: E402
from posttrain.parallel.script import run_script  # noqa: E402
from posttrain.training.inputs import load_chat  # noqa: E402
from posttrain.training.step import sampled_logps, train_step  # noqa: E402

RECIPE = {"out_dir": "unused", "max_iters": 2, "global_batch_size": 8, "learning_rate": 1e-2, "max_tokens_per_gpu": 400}
CASES = {  # how each is trained, and the folder that it begins with
    "activation_buffers": ("zero3", "float32", "base"),
    "router_bias": ("zero2", "bfloat16", "base"),
    "tied_by_flag_only": ("zero3", "float32", "base"),
    "released": ("zero1", "float32", "base"),
    "released_again": ("zero2", "float32", "../released/final"),  # a second stage
}


def result_of(folder: Path, name: str) -> None:
    zero, dtype, base = CASES[name]
    place = folder / name
    settings = RECIPE | {"ds_config": f"ds_configs/{zero}.json", "dtype": dtype, "checkpoint_path": str(place / base)}
    training = build_training(str(folder / "tiny"), "sft", settings)
    chat, model = load_chat(training.recipe, training.data.manifest), training.model
    before = gathered_state_dict(training.engine)
    for step in (1, 2):
        training.engine.set_learning_rate(RECIPE["learning_rate"])
        assert train_step(training, step).refused is None
    checkpoints = Checkpoints(training.engine, place / "run" / "checkpoints", 1, print, {"recipe": {"dtype": dtype}})
    checkpoints.save(2, training.guard.state())
    checkpoints.finish()
    expected, state = sampled_logps(training), gathered_state_dict(training.engine)
    if dist.get_rank() == 0:
        torch.save({"before": before, "after": dict(state), "logps": expected}, place / "trained.pt")
        (place / "run" / "model").mkdir()
        export.write_description(model, chat, place / "run" / "model")
        export.write_model(model, state, lambda into: export.write_description(model, chat, into), place / "final", "", expected)
    dist.barrier()


def main() -> None:
    folder = Path(sys.argv[-1])  # after what the launcher adds
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    for name in CASES:
        result_of(folder, name)


if __name__ == "__main__":
    run_script(main)
