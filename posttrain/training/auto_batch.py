"""Finds the number for max_tokens_per_gpu: auto. The planner estimates it, trials before step 1 correct it, on all ranks alike.

It is written into run.json, and a run that is resumed in the same setting keeps it, since other micro-batches would round differently.
"""

import contextlib
import warnings
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from torch import distributed as dist

from posttrain.data.batches import most_of_a_rank
from posttrain.data.prepared import PreparedData
from posttrain.engine.ds_config import read_ds_config
from posttrain.model.forms import described_at
from posttrain.parallel import watchdog
from posttrain.parallel.launched import read_launch
from posttrain.parallel.ranks import gathered, on_rank_0
from posttrain.planning.machines import FRAGMENTS, KEPT_BACK, this_machine
from posttrain.planning.planner import Planner, Way
from posttrain.recipes.keys import AUTO, Recipe
from posttrain.run.directory import Run
from posttrain.run.stored import is_run, read_facts
from posttrain.training.inputs import check_lengths
from posttrain.training.state import Training
from posttrain.training.step import try_largest

STEP = 64  # the number is a multiple of so many tokens
# the recipe's keys on which the number depends
MATTERS = ("activation_checkpointing", "compile", "kernels", "packing", "dtype", "global_batch_size", "share_prompt", "reference")


def tokens_to_begin_with(recipe: Recipe, data: PreparedData, device: torch.device) -> int:
    """Return the recipe's max_tokens_per_gpu; for auto the number that an existing run has found, or else the planner's. All ranks.

    Raises ValueError where an example is longer than that, or where by the planner's estimate the longest one does not fit.
    """
    tokens = recipe.max_tokens_per_gpu
    if tokens == AUTO:
        usable = min(gathered(usable_bytes(device)))
        tokens = on_rank_0(lambda: _found_earlier(recipe, device) or _estimated_tokens(recipe, usable, data.longest))
    check_lengths(data, tokens)
    return tokens


def adapt(training: Training, run: Run) -> None:
    """Replace the planner's number by one that is measured. All ranks.

    Two small trials show what a token takes; a third tries the number that should fit, and lowers it until it does.
    """
    device, data = training.device, training.data
    if on_rank_0(lambda: _found_earlier(run.recipe, device)):
        return
    most = max(data.longest, most_of_a_rank(data.train.lengths, run.recipe.global_batch_size, dist.get_world_size()))
    usable, longest, estimated = min(gathered(usable_bytes(device))), data.longest, training.max_tokens
    few, many = (max(longest, estimated // part) for part in (4, 2))
    _try(training, few)  # the first allocates gradients and the like, which then are not counted as the tokens'
    (few, lower), (many, upper) = _try(training, few), _try(training, many)
    a_token = (upper - lower) / (many - few) if many > few else 0.0
    tokens = _round_tokens(many + (usable - upper) / a_token, longest, most) if a_token > 0 else estimated
    tried, peak = _try(training, tokens)
    while peak > usable and tokens > longest:
        tokens = _round_tokens(_fewer(tried, peak, usable, [(few, lower), (many, upper)]), longest, most)
        tried, peak = _try(training, tokens)
    watchdog.enter("start")
    training.set_max_tokens(tokens)
    run.fitted = {"as": _setting(run.recipe, device), "max_tokens_per_gpu": tokens}
    found = "as many as a rank ever has in a step" if tokens == most else f"the planner estimated {estimated:,}"
    run.say(f"memory     max_tokens_per_gpu=auto: {tokens:,} tokens ({found}), which take {peak / 1e9:.1f} of {usable / 1e9:.1f} GB")


def _fewer(tried: int, peak: float, usable: float, measured: list[tuple[int, float]]) -> float:
    """Return fewer tokens than `tried`, which took `peak` bytes of the `usable`: on the line to the largest of `measured` that fitted.

    Where no smaller one fitted, half as many. The line, and not what the small trials said that a token takes: they may differ by less
    than what else the process allocated between them, and then a token seems to take next to nothing.
    """
    fitted, taken = max(((tokens, taken) for tokens, taken in measured if taken <= usable and tokens < tried), default=(0, peak))
    if not fitted:
        return tried / 2
    return min(fitted + (tried - fitted) * (usable - taken) / (peak - taken), tried - STEP)


def _try(training: Training, tokens: int) -> tuple[int, float]:
    """Run the largest micro-batch of at most `tokens`; return its tokens, and the most bytes that any rank takes for it. All ranks."""
    watchdog.enter("forward")
    _forget_peak(training.device)
    training.set_max_tokens(tokens)
    try:
        tried = try_largest(training)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"max_tokens_per_gpu=auto tried {tokens:,} tokens, for which rank {dist.get_rank()} has not enough memory: another process "
            f"uses some, or it is fragmented. Give a number: --max_tokens_per_gpu={max(tokens // 2, training.data.longest)}"
        ) from error
    return tried, max(gathered(_peak(training.device)))


def _round_tokens(tokens: float, longest: int, most: int) -> int:
    """Round down to a multiple of STEP, but to no less than `longest`; return `most` where `tokens` is more."""
    return most if tokens >= most else max(longest, int(tokens) // STEP * STEP)


def _setting(recipe: Recipe, device: torch.device) -> dict:
    """Return all that the number depends on."""
    settings = {key: getattr(recipe, key, None) for key in MATTERS}
    return {**ranks_and_device(device), "ds_config": read_ds_config(recipe.ds_config), **settings}


def ranks_and_device(device: torch.device) -> dict:
    """Return how many ranks the run has, and the name of their device."""
    return {"ranks": dist.get_world_size(), "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}


def _found_earlier(recipe: Recipe, device: torch.device) -> int | None:
    """Return the number that an earlier start of this run has found in the same setting, None if there is none."""
    run = Path(recipe.out_dir)
    found = read_facts(run).get("fitted") if is_run(run) else None
    return found["max_tokens_per_gpu"] if found and found["as"] == _setting(recipe, device) else None


def _estimated_tokens(recipe: Recipe, usable: float, longest: int) -> int:
    """Return the planner's number for `usable` bytes a rank. Raises ValueError where an example of `longest` tokens does not fit."""
    planner, way = planner_here(recipe, usable), Way(recipe.ds_config, recipe.activation_checkpointing)
    tokens = planner.most_tokens(way)
    if tokens < longest:
        needed = planner.parts(way, longest).total
        raise ValueError(
            f"max_tokens_per_gpu=auto: the longest example, {longest:,} tokens, is estimated to take {needed / 1e9:.1f} GB, and a rank has "
            f"{usable / 1e9:.1f}. Shard more (ds_config), recompute (activation_checkpointing), prepare with a smaller --max_length, or "
            "give a number instead of auto to try it all the same"
        )
    return max(longest, min(tokens, most_of_a_rank(planner.work.lengths, planner.batch, planner.ranks)))


def planner_here(recipe: Recipe, usable: float) -> Planner:
    """Return the planner of a run on these ranks, each of which has `usable` bytes; of its model, or of a checkpoint where that is gone."""
    ranks, local = dist.get_world_size(), read_launch().local_size
    gpus = local if ranks % local == 0 else ranks
    with warnings.catch_warnings(action="ignore"):  # loading warns of the same
        planner = Planner(recipe.at(described_at(recipe.model_path, recipe.out_dir)), this_machine(local), gpus, ranks // gpus)
    planner.usable = usable
    planner.fused &= recipe.compile or find_spec("liger_kernel") is not None
    return planner


def usable_bytes(device: torch.device) -> float:
    """Return the bytes that this rank can count on: what it holds and what is free, less a margin."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) * (1 - FRAGMENTS) - KEPT_BACK
    ranks_here = read_launch().local_size
    return (psutil.Process().memory_info().rss + psutil.virtual_memory().available / ranks_here) * (1 - FRAGMENTS)


def _forget_peak(device: torch.device) -> None:
    """Let _peak measure from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # if the system does not allow it, the peak stays that since the start
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak(device: torch.device) -> float:
    """Return the most bytes that this rank has held since _forget_peak: on a GPU allocated by torch, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return 1024 * int(status["VmHWM"].split()[0])
