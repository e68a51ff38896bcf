"""How long a save delays training, and how long a restart takes: python benchmarks/checkpoint.py

Two ranks, ZeRO-2 in float32, models of 37 and 202 million parameters (0.6 and 3.2 GB of state). For comparison: a mere copy of a rank's
state to host memory, which no save can do without, and DeepSpeed's own checkpoint engine. Written to benchmarks/results/checkpoint.json.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # instead of benchmarks/, whose kernels.py transformers would take for a library
SAVES = 5
SHAPES = {
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12, "head_dim": 64},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16, "head_dim": 64},
}


def worker(folder: Path) -> None:
    """Measure saves and restores with the model in FOLDER/world; rank 0 writes FOLDER/result.json. All ranks."""
    import torch
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from tiny import build_training
    from torch import distributed as dist

    from posttrain.engine import shards
    from posttrain.engine.checkpoints import Checkpoints
    from posttrain.training.step import train_step

    settings = {"out_dir": "unused", "max_iters": 9, "global_batch_size": 4, "learning_rate": 1e-4, "dtype": "float32"}
    training = build_training(str(folder / "world"), "sft", settings | {"ds_config": "ds_configs/zero2.json"})
    engine, wrapped = training.engine, training.engine.wrapped
    train_step(training, 1)
    theirs = []
    wrapped.checkpoint_engine = TorchCheckpointEngine()
    for save in range(SAVES):
        theirs.append(_timed(lambda save=save: wrapped.save_checkpoint(str(folder / "theirs"), tag=f"{save}", save_latest=False)))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "theirs")
        dist.barrier()
    checkpoints = Checkpoints(engine, folder / "ours", 2, lambda text: None, {})
    copies, blocked, whole, restored = [], [], [], []
    for save in range(SAVES):
        copies.append(_copy_seconds(engine))
        started = time.perf_counter()
        blocked.append(_timed(lambda save=save: checkpoints.save(save + 2, training.guard.state())))
        checkpoints.finish()
        whole.append(time.perf_counter() - started)
    for _ in range(SAVES):
        dist.barrier()
        restored.append(_timed(lambda: checkpoints.restore(checkpoints.newest())))
    if dist.get_rank() == 0:
        seconds = {"copy_to_host": copies, "blocked": blocked, "until_on_disk": whole, "deepspeed_blocked": theirs}
        seconds["verify_and_restore"] = restored
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first one allocates
        result = {
            "parameters": shards.count(engine.module),
            "bytes_on_disk": sum(p.stat().st_size for p in (folder / "ours" / "step_000006").iterdir()),
            "seconds": {name: round(value, 3) for name, value in medians.items()},
            "first_blocked": round(blocked[0], 3),
            "blocked_by_copy": round(medians["blocked"] / medians["copy_to_host"], 2),
            "deepspeed_by_ours": round(medians["deepspeed_blocked"] / medians["blocked"], 1),
        }
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    assert torch.isfinite(next(engine.module.parameters())).all()


def _timed(action) -> float:
    """Seconds that `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _copy_seconds(engine) -> float:
    """Seconds of the slowest rank to copy all that it saves into memory that is already allocated. All ranks."""
    import torch
    from torch import distributed as dist

    from posttrain.engine.writer import tensors_in

    state: list[torch.Tensor] = []
    tensors_in(engine.optimizer.state_dict(), state)
    if dist.get_rank() == 0:
        tensors_in(engine.module.state_dict(), state)
    buffers = [torch.zeros_like(tensor) for tensor in state]
    dist.barrier()
    started = time.perf_counter()
    for buffer, tensor in zip(buffers, state, strict=True):
        buffer.copy_(tensor)
    seconds = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def make_world(folder: Path, shape: dict) -> None:
    """Write the tests' tiny data, with a model of this shape."""
    import torch
    from tiny import make_tiny
    from transformers import AutoConfig, Qwen3ForCausalLM

    folder.mkdir()
    make_tiny(folder)
    config = AutoConfig.from_pretrained(folder / "base")
    config.update(shape | {"layer_types": ["full_attention"] * shape["num_hidden_layers"]})
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")


def measure(shape: dict) -> dict:
    """Run the worker on two ranks with a model of this shape, and return its result."""
    folder = Path(tempfile.mkdtemp(prefix="posttrain_checkpoint_"))
    make_world(folder / "world", shape)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--num_gpus", "2", "--master_port", port]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run([*command, __file__, "--worker", str(folder)], check=True, env=environment)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    about = {
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
    }
    results = about | {name: measure(shape) for name, shape in SHAPES.items()}
    text = json.dumps(results, indent=2) + "\n"
    (ROOT / "benchmarks" / "results" / "checkpoint.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        from posttrain.parallel.script import run_script

        place = Path(sys.argv[sys.argv.index("--worker") + 1])
        run_script(lambda: worker(place))
    main()
