"""The ranks of one host, which all meet as a run's do and send each other numbers: python wire.py SPEC

SPEC, JSON: first (rank of this host's first), slots (its ranks), world (ranks in all), hosts (NAME:SLOTS,...), address, port (where to
meet), seconds (without progress, until all end). Rank 0 prints what it found as a line of FOUND and JSON, among what NCCL may print: sizes
(bytes, seconds and GB/s over the bus of an all-reduce) and pairs (two ranks, GB/s one way).
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from posttrain.common import terminal
from posttrain.parallel import ranks, watchdog

SMALLEST, LARGEST = 2**10, 2**30  # bytes
LONG = 0.3  # seconds; an all-reduce that takes longer is the last
REPEATS = 5


def _fastest(action, synchronize) -> float:
    """Seconds; the first time, which sets up connections, is left out."""
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        started = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - started)
        watchdog.enter("data")
    return min(times[1:])


def all_reduces(device: torch.device, synchronize) -> list[tuple[int, float, float]]:
    found, size, world = [], SMALLEST, dist.get_world_size()
    seconds = torch.zeros(1, device=device)
    while size <= LARGEST and seconds < LONG:
        numbers = torch.zeros(size // 4, device=device)
        seconds[0] = _fastest(lambda numbers=numbers: dist.all_reduce(numbers), synchronize)
        dist.broadcast(seconds, src=0)
        found.append((size, seconds.item(), 2 * (world - 1) / world * size / seconds.item() / 1e9))
        size *= 8
    return found


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Each of `count` with each other once; in a round each has one partner, or none."""
    ring = list(range(count + count % 2))  # the circle method; the last has no partner where the number is odd
    found = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        found.append([tuple(sorted(pair)) for pair in pairs if max(pair) < count])
        ring.insert(1, ring.pop())
    return found


def pairs_of(slots: list[int]) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of ranks: each host's first with every other host's first, the second with the second, ...; then within each host."""
    firsts = [sum(slots[:host]) for host in range(len(slots))]
    between = [
        [(firsts[a] + local, firsts[b] + local) for a, b in one for local in range(min(slots[a], slots[b]))] for one in rounds(len(slots))
    ]
    within: list[list[tuple[int, int]]] = []
    for first, count in zip(firsts, slots, strict=True):
        for number, one in enumerate(rounds(count)):
            within += [[]] * (number + 1 - len(within))
            within[number] = within[number] + [(first + a, first + b) for a, b in one]
    return [one for one in between + within if one]


def pairs(slots: list[int], size: int, device: torch.device, synchronize, store: dist.Store) -> list[tuple[int, int, float]]:
    """GB/s one way, of a message there and back. On rank 0 all, on others none."""
    rank, numbers, found = dist.get_rank(), torch.zeros(size // 4, device=device), []
    for one in pairs_of(slots):
        mine = next((pair for pair in one if rank in pair), None)

        def there_and_back(mine=mine):
            if mine:
                other, sends = sum(mine) - rank, rank == mine[0]
                for step in (dist.send, dist.recv) if sends else (dist.recv, dist.send):
                    step(numbers, other)

        seconds = _fastest(there_and_back, synchronize)
        if mine and rank == mine[0]:
            store.set(f"doctor/{mine}", str(2 * size / seconds / 1e9))
        if rank == 0:
            found += [(*pair, float(store.get(f"doctor/{pair}"))) for pair in one]
    return found


def work(local_rank: int, spec: dict) -> None:
    rank = spec["first"] + local_rank
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(spec["world"]), "POSTTRAIN_HOSTS": spec["hosts"]}
    os.environ |= {"MASTER_ADDR": spec["address"], "MASTER_PORT": str(spec["port"])}
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    if on_gpu:
        torch.cuda.set_device(device)
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    try:
        store = ranks.connect("nccl" if on_gpu else "gloo", device, spec["seconds"], rank, spec["world"])
        slots = [int(entry.rpartition(":")[2]) for entry in spec["hosts"].split(",")]
        sizes = all_reduces(device, synchronize)
        found = pairs(slots, max(size for size, *_ in sizes if size <= 2**28), device, synchronize, store)
    except (ValueError, RuntimeError) as error:
        terminal.say_error(watchdog.explain() or f"error: {error}")
        os._exit(1)
    if rank == 0:
        print("FOUND " + json.dumps({"backend": dist.get_backend(), "sizes": sizes, "pairs": found}), flush=True)
    watchdog.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        spawn(work, (given,), nprocs=given["slots"])
    except ProcessExitedException:
        sys.exit(1)  # the rank has said why
