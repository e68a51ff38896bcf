"""Lets the ranks find each other, the first step of a run, which fails if the network blocks it or a host was forgotten."""

import os
import socket
from datetime import timedelta

from torch import distributed as dist

from posttrain.common.errors import first_line

PATIENCE = 300.0  # seconds to wait for the other ranks if `watchdog_seconds` is 0
INTERFACES = (
    "Where hosts have several networks, name the one that joins them, the same on every host, as in GLOO_SOCKET_IFNAME=eth0 (CPUs) or "
    "NCCL_SOCKET_IFNAME=eth0 (GPUs)"
)


def meet(seconds: float, rank: int, world_size: int) -> dist.TCPStore:
    """Wait until all ranks have connected to the store of rank 0 at MASTER_ADDR:MASTER_PORT, and return it. All ranks.

    Raises ValueError after `seconds` (0: PATIENCE), naming the missing ranks and their hosts, or saying that rank 0 cannot be reached;
    and at once if the store is another run's.
    """
    address, port, patience = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), seconds or PATIENCE
    here = f"rank {rank} on {socket.gethostname()}"
    try:
        store = dist.TCPStore(address, port, is_master=rank == 0, timeout=timedelta(seconds=patience), wait_for_workers=False)
    except dist.DistError as error:
        if rank == 0:
            raise ValueError(
                f"{here} cannot listen on port {port}: {first_line(error)}. Another run may have it; choose one with --master_port of "
                "deepspeed, or MASTER_PORT=... of the scripts in launch/"
            ) from None
        raise ValueError(
            f"{here} cannot reach rank 0 at {address}:{port} within {patience:.0f} s. Start the same command on "
            f"{_host_of(0) or 'its host'}, see that no firewall closes the port, and that the address (MASTER_ADDR) is that host's"
        ) from None
    try:
        _take_seat(store, here, rank, world_size, f"{address}:{port}")
        store.set(f"posttrain/here/{rank}", socket.gethostname())
        store.wait([f"posttrain/here/{other}" for other in range(world_size)])
    except dist.DistError:
        raise ValueError(_who_is_missing(store, here, world_size, f"{address}:{port}", patience)) from None
    return store


def _take_seat(store: dist.TCPStore, here: str, rank: int, world_size: int, place: str) -> None:
    """Raises ValueError if the store is another run's, because two commands use one port: writing this rank's state would end that run."""
    if rank == 0:
        store.set("posttrain/world_size", str(world_size))
    if (others := int(store.get("posttrain/world_size"))) != world_size or store.add(f"posttrain/seat/{rank}", 1) > 1:
        raise ValueError(
            f"{here} of {world_size} finds another run at {place}, of {others} ranks, which is not waiting for it. Choose another port: "
            "--master_port of deepspeed, or MASTER_PORT=... of the scripts in launch/"
        )


def _who_is_missing(store: dist.TCPStore, here: str, world_size: int, place: str, patience: float) -> str:
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
