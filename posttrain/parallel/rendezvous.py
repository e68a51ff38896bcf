"""The ranks find each other: the first thing that a run of several does, and the first that a network or a forgotten host hinders."""

import os
import socket
from datetime import timedelta

from torch import distributed as dist

from posttrain.common.errors import first_line

PATIENCE = 300.0  # seconds, where the recipe sets none
INTERFACES = (
    "Where hosts have several networks, name the one that joins them, the same on every host, as in GLOO_SOCKET_IFNAME=eth0 (CPUs) or "
    "NCCL_SOCKET_IFNAME=eth0 (GPUs)"
)


def meet(seconds: float, rank: int, world_size: int) -> dist.TCPStore:
    """The store that rank 0 keeps at MASTER_ADDR:MASTER_PORT, once all ranks have come to it. All ranks.

    Raises ValueError after `seconds` (0: PATIENCE) that names the hosts whose ranks have not come, or says that rank 0 cannot be reached.
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
    """Refuse to come to another run's store, where two commands have the same port: a word of this rank in it would end that run, too."""
    if rank == 0:
        store.set("posttrain/world_size", str(world_size))
    if (others := int(store.get("posttrain/world_size"))) != world_size or store.add(f"posttrain/seat/{rank}", 1) > 1:
        raise ValueError(
            f"{here} of {world_size} finds another run at {place}, of {others} ranks, which does not wait for it. Choose another port: "
            "--master_port of deepspeed, or MASTER_PORT=... of the scripts in launch/"
        )


def _who_is_missing(store: dist.TCPStore, here: str, world_size: int, place: str, patience: float) -> str:
    try:
        missing = [rank for rank in range(world_size) if not store.check([f"posttrain/here/{rank}"])]
        there = {store.get(f"posttrain/here/{rank}").decode() for rank in range(world_size) if rank not in missing}
    except dist.DistError:
        return f"{here} has lost rank 0, which kept {place}, before all ranks were there"
    names = ", ".join(f"{rank} ({host})" if (host := _host_of(rank)) else str(rank) for rank in missing)
    return (
        f"rank{'s' if len(missing) > 1 else ''} {names} of {world_size} ranks did not come to {place} within {patience:.0f} s; those of "
        f"{', '.join(sorted(there))} are there. Start the same command on every host; with another watchdog_seconds they wait longer"
    )


def _host_of(rank: int) -> str | None:
    """By the hostfile, where there is one (launch/multinode.py passes it on)."""
    for entry in filter(None, os.environ.get("POSTTRAIN_HOSTS", "").split(",")):
        host, _, slots = entry.rpartition(":")
        if rank < int(slots):
            return host
        rank -= int(slots)
    return None
