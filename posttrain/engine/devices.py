"""Looks before anything is loaded whether the GPUs of a run's ranks are of one kind, and free."""

import socket
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from posttrain.common.terminal import say
from posttrain.parallel.ranks import gathered

FULL, CROWDED = 0.5, 0.85  # shares of a GPU's memory: with less free it is taken for another's, or what is lacking is said
OWN = 2**31  # bytes that this process may have taken itself: its context, and what connects the ranks
PATIENCE = 60  # seconds in which the memory of a run that has just ended comes back, as after a restart
HOW_TO_SKIP = "--checks=off goes on all the same, and is recorded in the run"


class Gpu(NamedTuple):
    """The GPU of a rank."""

    host: str
    name: str
    memory: int  # bytes
    free: int  # bytes


def look_at_gpus(device: torch.device, checks: str) -> None:
    """Raise ValueError for GPUs of several kinds, or ones that are full; say what seems wrong, with `checks` off all of it. All ranks."""
    if device.type != "cuda":
        return
    free, memory = torch.cuda.mem_get_info(device)
    deadline = time.monotonic() + PATIENCE
    while free < FULL * memory and time.monotonic() < deadline:
        time.sleep(1)
        free, memory = torch.cuda.mem_get_info(device)
    gpus = [Gpu(*one) for one in gathered((socket.gethostname(), torch.cuda.get_device_name(device), memory, free))]
    problems = list(problems_of(gpus))
    if problems and checks == "on":
        raise ValueError(f"{problems[0]}. {HOW_TO_SKIP}")
    if torch.distributed.get_rank() == 0:
        for text in [*problems, *crowded(gpus)]:
            say(f"warning    {text}")


def problems_of(gpus: Sequence[Gpu]) -> Iterator[str]:
    """Yield a sentence for GPUs of several kinds, and one for those that are full; `gpus` are in the order of ranks."""
    kinds = {name: [rank for rank, gpu in enumerate(gpus) if gpu.name == name] for name in dict.fromkeys(gpu.name for gpu in gpus)}
    if len(kinds) > 1:
        seen = "; ".join(f"{name} (ranks {_listed(ranks)} on {_hosts(gpus, ranks)})" for name, ranks in kinds.items())
        yield (
            f"the GPUs of this run are of {len(kinds)} kinds: {seen}. All would wait for the slowest and could use no more memory than the "
            "smallest has: take GPUs of one kind, by CUDA_VISIBLE_DEVICES or the hostfile"
        )
    if full := [rank for rank, gpu in enumerate(gpus) if gpu.free < FULL * gpu.memory]:
        yield (
            f"{_told(gpus, full)}: another process uses it (nvidia-smi shows which). End that process, or take other GPUs by "
            "CUDA_VISIBLE_DEVICES"
        )


def crowded(gpus: Sequence[Gpu]) -> Iterator[str]:
    """Yield a sentence for GPUs of which another process uses a part."""
    if some := [rank for rank, gpu in enumerate(gpus) if FULL * gpu.memory <= gpu.free < min(CROWDED * gpu.memory, gpu.memory - OWN)]:
        yield f"{_told(gpus, some)}; another process uses the rest"


def _told(gpus: Sequence[Gpu], ranks: list[int]) -> str:
    """Return how much of the first of some ranks' GPUs is free, and how many others are like it."""
    gpu = gpus[ranks[0]]
    others = f" (and so of {len(ranks) - 1} others)" if len(ranks) > 1 else ""
    return f"of the GPU of rank {ranks[0]} on {gpu.host} {gpu.free / 2**30:.1f} of {gpu.memory / 2**30:.1f} GiB are free{others}"


def _listed(ranks: list[int]) -> str:
    """Return ranks as text, of many the first and the last."""
    return ", ".join(map(str, ranks)) if len(ranks) < 9 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"


def _hosts(gpus: Sequence[Gpu], ranks: list[int]) -> str:
    """Return the hosts of some ranks, the first three."""
    hosts = list(dict.fromkeys(gpus[rank].host for rank in ranks))
    return ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} others" if len(hosts) > 3 else "")
