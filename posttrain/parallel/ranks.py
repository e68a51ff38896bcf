"""Ranks connect, and hand each other Python values. All ranks call these, the same number of times."""

import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed as dist

from posttrain.common.errors import first_line, is_mistake
from posttrain.parallel import rendezvous, watchdog


def connect(backend: str, device: torch.device, seconds: float, rank: int, world_size: int) -> dist.Store:
    """The process group, with a connection from every rank to every other, all watched: see watchdog.py. All ranks.

    `seconds`: without progress. Returns the store that they met in. Raises ValueError where ranks do not come, or cannot connect.
    """
    store = rendezvous.meet(seconds, rank, world_size)
    watchdog.start(seconds, rank, world_size)
    watchdog.enter("connect")
    try:
        # the timeout is long, since ranks wait while rank 0 writes the result; a hang is the watchdog's to find
        how = {"store": store, "rank": rank, "world_size": world_size, "timeout": timedelta(hours=2)}
        dist.init_process_group(backend, **how)
        dist.all_reduce(torch.zeros(1, device=device))
    except RuntimeError as error:
        raise ValueError(
            f"rank {rank} on {socket.gethostname()} cannot connect to the other ranks: {first_line(error)}. {rendezvous.INTERFACES}"
        ) from error
    watchdog.enter("start")
    return store


def gathered(value) -> list:
    """Every rank's value, on every rank. All ranks."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(action: Callable):
    """What `action` returns on rank 0, on every rank; its OSError, or a mistake as ValueError, is raised on every rank. All ranks."""
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (OSError, ValueError) as error:
            box[1] = (ValueError if is_mistake(error) else OSError, str(error))
    dist.broadcast_object_list(box, src=0)
    if box[1]:
        kind, message = box[1]
        raise kind(message)
    return box[0]


def same_on_all_ranks(what: str, parts: dict[str, str]) -> None:
    """Raise on every rank, naming ranks, hosts and the first differing part, unless all ranks hold the same hashes."""
    hosts, seen = zip(*gathered((socket.gethostname(), parts)), strict=True)
    different = [rank for rank, value in enumerate(seen) if value != seen[0]]
    if different:
        other = seen[different[0]]
        names = [name for name in {**seen[0], **other} if seen[0].get(name) != other.get(name)]
        there, here = sorted({hosts[rank] for rank in different}), hosts[0]
        where, whose = (f" (on {', '.join(there)})", f" (on {here})") if there != [here] else ("", "")
        raise ValueError(
            f"ranks {different}{where} hold another {what} than rank 0{whose}: {len(names)} of {len(seen[0])} parts differ, first "
            f"{names[0]}. The ranks did not read the same: compare the command and the files on their hosts"
        )
