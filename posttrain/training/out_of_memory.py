"""Turns a rank's want of memory into one sentence that names what takes less."""

import re
import socket

import torch

from posttrain.common.errors import first_line
from posttrain.parallel.launched import read_launch
from posttrain.planning.planner import CHECKPOINTING, STAGES
from posttrain.recipes.keys import AUTO, Recipe


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def too_little_memory(error: BaseException, recipe: Recipe) -> str:
    """Return what to say of it; `recipe` is the one that was trained by, its layout settled."""
    found = re.search(r"[Tt]ried to allocate .*?(?= Including|, but you are|\. If|$)", str(error), re.MULTILINE)
    what = found[0].rstrip(".") if found else first_line(error)
    return (
        f"rank {read_launch().rank} on {socket.gethostname()} has not enough memory for this run ({what}). What takes less:\n"
        f"    {smaller(recipe)}\nThe curve does not depend on it, and the same command with it goes on from the newest checkpoint"
    )


def smaller(recipe: Recipe) -> str:
    """Return the options that take less memory than the recipe's, all three of the layout's, so that none is chosen again.

    Micro-batches are halved and more is recomputed; where all is recomputed already, more is sharded.
    """
    ds_config, checkpointing, tokens = recipe.ds_config, recipe.activation_checkpointing, recipe.max_tokens_per_gpu
    if checkpointing in CHECKPOINTING[:-1]:
        checkpointing = CHECKPOINTING[CHECKPOINTING.index(checkpointing) + 1]
    elif ds_config in STAGES[:-1]:
        ds_config = STAGES[STAGES.index(ds_config) + 1]
    tokens = tokens if tokens == AUTO else max(1, tokens // 2)
    return f"--ds_config={ds_config} --activation_checkpointing={checkpointing} --max_tokens_per_gpu={tokens}"
