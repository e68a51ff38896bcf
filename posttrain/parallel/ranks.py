"""Connects the ranks, and passes Python values between them. All ranks call these functions, the same number of times."""

import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed as dist

from posttrain.common.errors import described, first_line, is_mistake
from posttrain.parallel import rendezvous, watchdog
from posttrain.parallel.launched import Launch

OPEN_FILES = "A process may have too few files open here, and every rank needs one for each other rank: ulimit -n 65536"


def connect(backend: str, device: torch.device, seconds: float, launch: Launch) -> dist.Store:
    """Set up the process group, with a connection from every rank to every other, and start the watchdog. All ranks.

    `seconds`: how long a rank may make no progress (0: any time), see watchdog.py. Returns the store in which the ranks met.
    Raises ValueError if a rank is missing or cannot connect to another.
    """
    store = rendezvous.meet(seconds, launch)
    watchdog.start(seconds, launch)
    watchdog.enter("connect")
    try:
        # a long timeout, since ranks wait while rank 0 writes the result; the watchdog notices a rank that hangs
        how = {"store": store, "rank": launch.rank, "world_size": launch.world_size, "timeout": timedelta(hours=2)}
        if device.type == "cuda":
            how["device_id"] = device  # else torch guesses each rank's GPU where a call has no tensor
        dist.init_process_group(backend, **how)
        dist.all_reduce(torch.zeros(1, device=device))
    except RuntimeError as error:
        advice = OPEN_FILES if "Too many open files" in str(error) else rendezvous.INTERFACES
        raise ValueError(
            f"rank {launch.rank} on {socket.gethostname()} cannot connect to the other ranks: {first_line(error)}. {advice}"
        ) from error
    watchdog.enter("start")
    return store


def gathered(value) -> list:
    """Returns the values of all ranks, in the order of ranks, on every rank. All ranks."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(action: Callable):
    """Run `action` on rank 0 only, and return its result on every rank. All ranks.

    If it raises OSError or ValueError, so does every rank: ValueError for a user's mistake (`errors.is_mistake`), else OSError.
    """
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (OSError, ValueError) as error:
            box[1] = (ValueError if is_mistake(error) else OSError, described(error))
    dist.broadcast_object_list(box, src=0)
    if box[1]:
        kind, message = box[1]
        raise kind(message)
    return box[0]


def same_on_all_ranks(what: str, parts: dict[str, str]) -> None:
    """Check that all ranks hold the same hashes, `parts`: part -> hash. All ranks.

    Otherwise raises ValueError on every rank, naming the ranks that differ from rank 0, their hosts and the first such part.
    """
    hosts, seen = zip(*gathered((socket.gethostname(), parts)), strict=True)
    different = [rank for rank, value in enumerate(seen) if value != seen[0]]
    if different:
        other = seen[different[0]]
        names = [name for name in {**seen[0], **other} if seen[0].get(name) != other.get(name)]
        there, here = sorted({hosts[rank] for rank in different}), hosts[0]
        where, whose = (f" (on {', '.join(there)})", f" (on {here})") if there != [here] else ("", "")
        raise ValueError(
            f"ranks {different}{where} differ from rank 0{whose} in their {what}: {len(names)} of {len(seen[0])} parts differ, first "
            f"{names[0]}. They did not read the same files or options: compare the command and the files on their hosts"
        )
