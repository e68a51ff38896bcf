"""Turns a rank's want of memory into one sentence that names what takes less."""

import re
import socket

import torch

from posttrain.common.errors import first_line
from posttrain.parallel.launched import read_launch
from posttrain.planning.planner import OFFLOAD, STAGES
from posttrain.recipes.keys import AUTO, Recipe

TEXTS = ("can't allocate memory", "CUDA error: out of memory")  # of the host's memory, of pinned memory; torch has no class for them


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in TEXTS)


def too_little_memory(error: BaseException, recipe: Recipe, longest: int) -> str:
    """Return what to say of it; `recipe` is the one that was trained by, its layout settled, and `longest` the tokens of an example."""
    found = re.search(r"[Tt]ried to allocate .*?(?= Including|, but you are|\. If|$)", str(error), re.MULTILINE)
    what = found[0].rstrip(".") if found else first_line(error)
    less = smaller(recipe, longest)
    how = (
        f"What takes less:\n    {less}\nThe curve does not depend on it, and the same command with it goes on from the newest checkpoint"
        if less
        else "No option takes less: take more GPUs, or prepare the data with a smaller --max_length"
    )
    return f"rank {read_launch().rank} on {socket.gethostname()} has not enough memory for this run ({what}). {how}"


def smaller(recipe: Recipe, longest: int) -> str:
    """Return the options that take less memory than the recipe's, all three of the layout's, so that none is chosen again; "" if none do.

    Micro-batches are halved, down to the longest example, and all layers recomputed; where both are so, more is sharded.
    """
    ds_config, checkpointing, tokens = recipe.ds_config, recipe.activation_checkpointing, recipe.max_tokens_per_gpu
    if tokens != AUTO and recipe.packing:
        tokens = max(longest, tokens // 2)
    if checkpointing in ("none", "selective"):
        checkpointing = "full"
    elif ds_config in STAGES[:-1]:
        following = STAGES[STAGES.index(ds_config) + 1]
        ds_config = following if following != OFFLOAD or torch.cuda.is_available() else ds_config
    less = ds_config, checkpointing, tokens
    if less == (recipe.ds_config, recipe.activation_checkpointing, recipe.max_tokens_per_gpu):
        return ""
    return f"--ds_config={ds_config} --activation_checkpointing={checkpointing} --max_tokens_per_gpu={tokens}"
