"""max_tokens_per_gpu: auto. The planner says how large a micro-batch may be, trials before step 1 correct it, on all ranks alike.

What was found is written into the run, which goes on with it where it is started again alike: other micro-batches would round otherwise.
"""

import contextlib
import json
import os
from pathlib import Path

import psutil
import torch
from torch import distributed as dist

from posttrain.data.batches import most_of_a_rank
from posttrain.data.prepared import PreparedData
from posttrain.engine.ds_config import read_ds_config
from posttrain.parallel import watchdog
from posttrain.parallel.ranks import gathered, on_rank_0
from posttrain.planning.machines import FRAGMENTS, KEPT_BACK, this_machine
from posttrain.planning.planner import Planner
from posttrain.recipes.keys import AUTO, Recipe
from posttrain.run.directory import Run
from posttrain.training.inputs import check_lengths
from posttrain.training.state import Training
from posttrain.training.step import try_largest

STEP = 1024  # tokens; what is found is a multiple
MATTERS = ("activation_checkpointing", "compile", "kernels", "packing", "dtype", "global_batch_size", "share_prompt", "reference")


def tokens_to_begin_with(recipe: Recipe, data: PreparedData, device: torch.device) -> int:
    """The recipe's max_tokens_per_gpu; for auto what the run that is there has found, or else the planner's number. All ranks.

    Raises ValueError where an example is longer, or by the planner not even the longest one fits.
    """
    tokens = recipe.max_tokens_per_gpu
    if tokens == AUTO:
        usable = min(gathered(_usable(device)))
        tokens = on_rank_0(lambda: _of_the_run(recipe, device) or _by_planner(recipe, usable, data.longest))
    check_lengths(data, tokens)
    return tokens


def adapt(training: Training, run: Run) -> None:
    """Let memory decide: two small trials say what a token takes, a third tries what then fits. All ranks."""
    device, data = training.device, training.data
    if on_rank_0(lambda: _of_the_run(run.recipe, device)):
        return
    most = max(data.longest, most_of_a_rank(data.train.lengths, run.recipe.global_batch_size, dist.get_world_size()))
    usable, longest, planned_tokens = min(gathered(_usable(device))), data.longest, training.max_tokens
    few, many = (max(longest, planned_tokens // part) for part in (4, 2))
    _try(training, few)  # what is there from the first time on, as gradients are, is not counted as a token's
    (few, lower), (many, upper) = _try(training, few), _try(training, many)
    a_token = (upper - lower) / (many - few) if many > few else 0.0
    tokens = _whole(many + (usable - upper) / a_token, longest, most) if a_token > 0 else planned_tokens
    tried, peak = _try(training, tokens)
    while peak > usable and tokens > longest and a_token > 0:
        tokens = _whole(min(tokens, tried) - (peak - usable) / a_token - STEP, longest, most)
        tried, peak = _try(training, tokens)
    watchdog.enter("start")
    training.set_max_tokens(tokens)
    run.fitted = {"as": _setting(run.recipe, device), "max_tokens_per_gpu": tokens}
    found = "all that a rank ever has in a step" if tokens == most else f"the planner said {planned_tokens:,}"
    run.say(f"memory     max_tokens_per_gpu=auto: {tokens:,}, {found}; they take {peak / 1e9:.1f} of {usable / 1e9:.1f} GB")


def _try(training: Training, tokens: int) -> tuple[int, float]:
    """Tokens of the run's largest micro-batch of at most so many, and the most memory that any rank takes with it, in bytes."""
    watchdog.enter("forward")
    _forget_peak(training.device)
    training.set_max_tokens(tokens)
    try:
        tried = try_largest(training)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"max_tokens_per_gpu=auto tried {tokens:,} tokens, for which rank {dist.get_rank()} has no memory: another process takes some, "
            f"or it is fragmented. Give a number: --max_tokens_per_gpu={max(tokens // 2, training.data.longest)}"
        ) from error
    return tried, max(gathered(_peak(training.device)))


def _whole(tokens: float, longest: int, most: int) -> int:
    return most if tokens >= most else max(longest, int(tokens) // STEP * STEP)


def _setting(recipe: Recipe, device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    settings = {key: getattr(recipe, key, None) for key in MATTERS}
    return {"ranks": dist.get_world_size(), "device": name, "ds_config": read_ds_config(recipe.ds_config), **settings}


def _of_the_run(recipe: Recipe, device: torch.device) -> int | None:
    """What an earlier start of this run has found in the same setting."""
    with contextlib.suppress(FileNotFoundError):
        found = json.loads((Path(recipe.out_dir) / "run.json").read_text()).get("fitted")
        if found and found["as"] == _setting(recipe, device):
            return found["max_tokens_per_gpu"]
    return None


def _by_planner(recipe: Recipe, usable: float, longest: int) -> int:
    planner = Planner(recipe, this_machine(dist.get_world_size()), dist.get_world_size(), 1)
    planner.usable = usable
    tokens = planner.most_tokens(recipe.ds_config, recipe.activation_checkpointing)
    if tokens < longest:
        needed = planner.parts(recipe.ds_config, recipe.activation_checkpointing, longest).total
        raise ValueError(
            f"max_tokens_per_gpu=auto: the longest example, {longest:,} tokens, takes {needed / 1e9:.1f} GB by the planner, and a rank has "
            f"{usable / 1e9:.1f}. Shard more (ds_config), recompute (activation_checkpointing), prepare with a smaller --max_length, or "
            "give a number to try it all the same"
        )
    return max(longest, min(tokens, most_of_a_rank(planner.work.lengths, planner.batch, planner.ranks)))


def _usable(device: torch.device) -> float:
    """Bytes that this rank can count on."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) * (1 - FRAGMENTS) - KEPT_BACK
    ranks_here = int(os.environ.get("LOCAL_SIZE", "1"))
    return (psutil.Process().memory_info().rss + psutil.virtual_memory().available / ranks_here) * (1 - FRAGMENTS)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # where the system does not allow it the peak is that since the start
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])
