"""Checkpoints to continue from: DeepSpeed's engine state plus the step, in checkpoints/step_000200/.

Written under a staging name and renamed when complete, so a folder named step_* is whole; older ones are deleted only after that.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from torch import distributed as dist

from posttrain.guard import StepGuard

KEPT = 2  # newest checkpoints kept


def save(engine, folder: Path, step: int, guard: StepGuard) -> Path:
    """Save the engine after optimizer step `step`, with its guard. All ranks."""
    name = f"step_{step:06d}"
    staging = folder / f"{name}.incomplete"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(engine, folder)
        shutil.rmtree(staging, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=staging.name, client_state={"guard": guard.state()}, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        facts = {
            "step": step,
            "last_applied": guard.last_applied,
            "world_size": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
        }
        (staging / "checkpoint.json").write_text(json.dumps(facts) + "\n")
        shutil.rmtree(folder / name, ignore_errors=True)
        staging.rename(folder / name)
        for old in complete(folder)[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()
    return folder / name


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "checkpoint.json").is_file() and not path.name.endswith(".incomplete"))


def resume(engine, folder: Path, guard: StepGuard, before: float = math.inf) -> int:
    """Load the newest checkpoint whose weights no step from `before` on has changed, and the guard's state with it. All ranks.

    Returns the step it was taken after, or 0 where there is no such checkpoint.
    """
    read = {path: json.loads((path / "checkpoint.json").read_text()) for path in complete(folder)}
    found = [path for path, facts in read.items() if facts["last_applied"] < before]
    if not found:
        return 0
    facts = read[found[-1]]
    now = {"world_size": dist.get_world_size(), "zero_stage": engine.zero_optimization_stage()}
    different = [f"{name} {facts[name]} -> {value}" for name, value in now.items() if facts[name] != value]
    if different:
        raise ValueError(f"{found[-1]} cannot be continued with another layout yet ({', '.join(different)}); start it as it was")
    path, client_state = engine.load_checkpoint(str(folder), tag=found[-1].name)
    if path is None:
        raise ValueError(f"DeepSpeed could not load {found[-1]}; delete it to continue from the one before")
    guard.restore(client_state["guard"])
    return facts["step"]


def _check_space(engine, folder: Path) -> None:
    """Weights, float32 master weights and two moments; refused before anything is written."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    needed = parameters * (torch.finfo(next(engine.module.parameters()).dtype).bits // 8 + 12)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder}: a checkpoint needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; nothing was deleted")
