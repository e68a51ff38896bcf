"""The machines that plan.py knows: GPUs by name, and the one that it runs on."""

from dataclasses import dataclass, replace

import psutil
import torch

MIB = 2**20


@dataclass(frozen=True)
class Device:
    """One rank's device: speeds as its maker states them, memory as its driver shows it."""

    name: str
    memory: float  # bytes
    peak: float  # bfloat16 FLOP/s of the matrix units
    link: float  # bytes/s, one way, to the others of its node
    net: float = 50e9  # bytes/s, one way, to other nodes: 400 Gbit/s a GPU


GPUS = {
    "b300": Device("B300", 275_040 * MIB, 2500e12, 900e9),
    "b200": Device("B200", 183_359 * MIB, 2250e12, 900e9),
    "h200": Device("H200", 143_771 * MIB, 989e12, 450e9),
    "h100": Device("H100", 81_559 * MIB, 989e12, 450e9),
    "a100": Device("A100", 81_920 * MIB, 312e12, 300e9),
}
KEPT_BACK = 2e9  # bytes of a GPU that a run cannot have: the driver's context, NCCL's buffers
FRAGMENTS = 0.06  # share of the memory that the allocator loses to fragmentation


def this_machine(ranks: int) -> Device:
    """Return what each of `ranks` ranks on this machine has: its GPU, or without one an equal share of the free memory."""
    if not torch.cuda.is_available():
        return Device("CPU", psutil.virtual_memory().available / ranks, 1e12, 1e9)
    properties = torch.cuda.get_device_properties(0)
    known = [gpu for gpu in GPUS.values() if gpu.name in properties.name]
    return replace(known[0] if known else GPUS["a100"], name=properties.name, memory=properties.total_memory)
