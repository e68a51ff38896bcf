"""Starts the ranks of one host, which meet those of all hosts as a run's do, and measures the network: python wire.py SPEC

SPEC, JSON: first (the lowest rank of this host), slots (its number of ranks), world (ranks of all hosts), hosts (NAME:SLOTS,...), address
and port (where the ranks meet), seconds (after which a rank without progress ends all). Rank 0 prints a line of FOUND and JSON, among what
NCCL may print: backend, sizes (bytes, seconds and GB/s over the bus of an all-reduce) and pairs (two ranks, GB/s one way).
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(next(above for above in Path(__file__).resolve().parents[2:] if (above / "posttrain").is_dir())))

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from posttrain.common import terminal
from posttrain.parallel import ranks, watchdog
from posttrain.parallel.launched import Launch

SMALLEST, LARGEST = 2**10, 2**30  # bytes of an all-reduce
LONG = 0.3  # seconds; no larger all-reduce follows one that takes longer
REPEATS = 5  # of which the fastest counts


def _fastest(action, synchronize) -> float:
    """The least seconds that `action` takes; the first call, which sets up connections, does not count. All ranks."""
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
    """Bytes, seconds and bus bandwidth (GB/s, as nccl-tests defines it) of all-reduces of growing size. All ranks."""
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
    """Pair each of `count` players with each other once, in rounds in which each has at most one partner."""
    ring = list(range(count + count % 2))  # the circle method; the partner of the added one pauses where the number is odd
    found = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        found.append([tuple(sorted(pair)) for pair in pairs if max(pair) < count])
        ring.insert(1, ring.pop())
    return found


def pairs_of(slots: list[int]) -> list[list[tuple[int, int]]]:
    """Pairs of ranks in rounds: the first ranks of every two hosts, their second ranks, ...; then every two ranks within each host."""
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
    """Two ranks and the GB/s one way between them, from messages of `size` bytes there and back; empty on ranks but 0. All ranks."""
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
    """Be one rank: meet the others, send and measure; rank 0 prints what was found."""
    rank = spec["first"] + local_rank
    os.environ["POSTTRAIN_HOSTS"] = spec["hosts"]
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    if on_gpu:
        torch.cuda.set_device(device)
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    try:
        launch = Launch(rank, spec["world"], local_rank, spec["slots"], address=spec["address"], port=int(spec["port"]))
        store = ranks.connect("nccl" if on_gpu else "gloo", device, spec["seconds"], launch)
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
