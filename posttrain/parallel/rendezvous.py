"""Lets the ranks find each other, the first step of a run, which fails if the network blocks it or a host was forgotten."""

import os
import socket
from datetime import timedelta
from pathlib import Path

from torch import distributed as dist

from posttrain.common.errors import first_line
from posttrain.parallel.launched import Launch

PATIENCE = 300.0  # seconds to wait for the other ranks if `watchdog_seconds` is 0
INTERFACES = (
    "Where hosts have several networks, name the one that joins them, the same on every host, as in GLOO_SOCKET_IFNAME=eth0 (CPUs) or "
    "NCCL_SOCKET_IFNAME=eth0 (GPUs)"
)


def meet(seconds: float, launch: Launch) -> dist.Store:
    """Wait until all ranks have connected to the store at the launch's address, and return it. All ranks.

    Rank 0 holds the store, or torchrun does. Raises ValueError after `seconds` (0: PATIENCE), naming the missing ranks and their hosts, or
    saying that the store cannot be reached; and at once if the store is another run's, or if ranks of one host do not know which is which.
    """
    patience, place, rank = seconds or PATIENCE, f"{launch.address}:{launch.port}", launch.rank
    here, listens = f"rank {rank} on {socket.gethostname()}", rank == 0 and not launch.meets_at_agent
    try:
        store = open_store(launch, patience, listens)
    except dist.DistError as error:
        if listens:
            raise ValueError(
                f"{here} cannot listen on port {launch.port}: {first_line(error)}. Another run may have it; choose one with --master_port "
                "of deepspeed or torchrun, or MASTER_PORT=... of the scripts in launch/"
            ) from None
        raise ValueError(
            f"{here} cannot reach rank 0 at {place} within {patience:.0f} s. Start the same command on {_host_of(0) or 'its host'}, see "
            "that no firewall closes the port, and that the address (MASTER_ADDR) is that host's"
        ) from None
    try:
        _take_seat(store, here, launch)
        store.set(f"posttrain/here/{rank}", socket.gethostname())
        store.set(f"posttrain/machine/{rank}", machine_id())
        store.wait([f"posttrain/{what}/{other}" for what in ("here", "machine") for other in range(launch.world_size)])
        if launch.is_alone_here:
            _refuse_company(store, here, launch)
    except dist.DistError:
        raise ValueError(_who_is_missing(store, here, launch.world_size, place, patience)) from None
    return store


def open_store(launch: Launch, seconds: float, listens: bool = False) -> dist.Store:
    """Connect to the store in which the ranks of a launch meet, or `listens`: open it. Raises DistError after `seconds`."""
    timeout = timedelta(seconds=seconds)
    store = dist.TCPStore(launch.address, launch.port, is_master=listens, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"start {launch.attempt}", store) if launch.attempt else store


def machine_id() -> str:
    """Returns an id of the scope in which process ids are unique: this boot of this machine, in this container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _take_seat(store: dist.Store, here: str, launch: Launch) -> None:
    """Raises ValueError if the store is another run's, because two commands use one port: writing this rank's state would end that run."""
    if launch.rank == 0:
        store.set("posttrain/world_size", str(launch.world_size))
    if (others := int(store.get("posttrain/world_size"))) != launch.world_size or store.add(f"posttrain/seat/{launch.rank}", 1) > 1:
        raise ValueError(
            f"{here} of {launch.world_size} finds another run at {launch.address}:{launch.port}, of {others} ranks, which is not waiting "
            "for it. Choose another port: --master_port of deepspeed or torchrun, or MASTER_PORT=... of the scripts in launch/"
        )


def _refuse_company(store: dist.Store, here: str, launch: Launch) -> None:
    """Raises ValueError if another rank is on the machine of this one, which has no LOCAL_RANK."""
    beside = [rank for rank in range(launch.world_size) if store.get(f"posttrain/machine/{rank}").decode() == machine_id()]
    if len(beside) > 1:
        raise ValueError(
            f"{here} is one of {len(beside)} ranks of this machine (ranks {', '.join(map(str, beside))}), and LOCAL_RANK, which says which "
            "GPU each takes, is not set. torchrun and deepspeed set it: start with one of them, or set LOCAL_RANK to 0, 1, ..."
        )


def _who_is_missing(store: dist.Store, here: str, world_size: int, place: str, patience: float) -> str:
    """Returns the error message for ranks that did not connect: which ones, and on which hosts."""
    try:
        missing = [rank for rank in range(world_size) if not store.check([f"posttrain/here/{rank}"])]
        there = {store.get(f"posttrain/here/{rank}").decode() for rank in range(world_size) if rank not in missing}
    except dist.DistError:
        return f"{here} lost its connection to rank 0 at {place} before all ranks had connected"
    names = ", ".join(f"{rank} ({host})" if (host := _host_of(rank)) else str(rank) for rank in missing)
    return (
        f"rank{'s' if len(missing) > 1 else ''} {names} of {world_size} ranks did not connect to {place} within {patience:.0f} s; those of "
        f"{', '.join(sorted(there))} did. Start the same command on every host; with a larger watchdog_seconds they wait longer"
    )


def _host_of(rank: int) -> str | None:
    """Returns the host of a rank according to the hostfile, which launch/multinode.py passes on; None without one."""
    for entry in filter(None, os.environ.get("POSTTRAIN_HOSTS", "").split(",")):
        host, _, slots = entry.rpartition(":")
        if rank < int(slots):
            return host
        rank -= int(slots)
    return None
