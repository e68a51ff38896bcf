"""The machines that plan.py knows: GPUs by name, and the one that it runs on."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

MIB = 2**20
CGROUPS = Path("/sys/fs/cgroup")  # as a container sees its own


@dataclass(frozen=True)
class Device:
    """One rank's device: speeds as its maker states them, memory as its driver shows it."""

    name: str
    memory: float  # bytes
    peak: float  # bfloat16 FLOP/s of the matrix units
    link: float  # bytes/s, one way, to the others of its node
    net: float = 50e9  # bytes/s, one way, to other nodes: 400 Gbit/s a GPU


PCIE_4, PCIE_5 = 25e9, 50e9  # bytes/s, one way, that a copy over 16 lanes reaches
GPUS = {
    # data centre, NVLink
    "b300": Device("B300", 275_040 * MIB, 2500e12, 900e9),
    "b200": Device("B200", 183_359 * MIB, 2250e12, 900e9),
    "gb200": Device("GB200", 189_471 * MIB, 2500e12, 900e9),
    "gh200": Device("GH200", 97_871 * MIB, 989e12, 450e9),
    "h200": Device("H200", 143_771 * MIB, 989e12, 450e9),
    "h200 nvl": Device("H200 NVL", 143_771 * MIB, 835e12, 450e9),
    "h100": Device("H100", 81_559 * MIB, 989e12, 450e9),
    "h100 nvl": Device("H100 NVL", 95_830 * MIB, 835e12, 300e9),
    "h100 pcie": Device("H100 PCIe", 81_559 * MIB, 756e12, PCIE_5),
    "h800": Device("H800", 81_559 * MIB, 989e12, 200e9),
    "h20": Device("H20", 97_871 * MIB, 148e12, 450e9),
    "a100": Device("A100", 81_920 * MIB, 312e12, 300e9),
    "a100 pcie": Device("A100 PCIe", 81_920 * MIB, 312e12, PCIE_4),
    "a800": Device("A800", 81_920 * MIB, 312e12, 200e9),
    # data centre, PCIe
    "l40s": Device("L40S", 46_068 * MIB, 362e12, PCIE_4),
    "l40": Device("L40", 46_068 * MIB, 181e12, PCIE_4),
    "l4": Device("L4", 23_034 * MIB, 121e12, PCIE_4),
    "a40": Device("A40", 46_068 * MIB, 150e12, PCIE_4),
    "a30": Device("A30", 24_576 * MIB, 165e12, PCIE_4),
    "a16": Device("A16", 15_356 * MIB, 18e12, PCIE_4),
    "a10": Device("A10", 23_028 * MIB, 125e12, PCIE_4),
    "a10g": Device("A10G", 23_028 * MIB, 70e12, PCIE_4),
    "a2": Device("A2", 15_356 * MIB, 18e12, PCIE_4),
    # workstation
    "pro 6000": Device("RTX PRO 6000 Blackwell", 97_887 * MIB, 500e12, PCIE_5),
    "6000 ada": Device("RTX 6000 Ada", 49_140 * MIB, 364e12, PCIE_4),
    "5000 ada": Device("RTX 5000 Ada", 32_760 * MIB, 261e12, PCIE_4),
    "4000 ada": Device("RTX 4000 Ada", 20_475 * MIB, 107e12, PCIE_4),
    "a6000": Device("RTX A6000", 49_140 * MIB, 155e12, PCIE_4),
    "a5000": Device("RTX A5000", 24_564 * MIB, 111e12, PCIE_4),
    "a4500": Device("RTX A4500", 20_470 * MIB, 95e12, PCIE_4),
    "a4000": Device("RTX A4000", 16_376 * MIB, 77e12, PCIE_4),
    # desktop
    "5090": Device("RTX 5090", 32_607 * MIB, 210e12, PCIE_5),
    "5080": Device("RTX 5080", 16_303 * MIB, 113e12, PCIE_5),
    "5070 ti": Device("RTX 5070 Ti", 16_303 * MIB, 88e12, PCIE_5),
    "4090": Device("RTX 4090", 24_564 * MIB, 165e12, PCIE_4),
    "4080": Device("RTX 4080", 16_376 * MIB, 97e12, PCIE_4),
    "4080 super": Device("RTX 4080 SUPER", 16_376 * MIB, 104e12, PCIE_4),
    "4070 ti super": Device("RTX 4070 Ti SUPER", 16_376 * MIB, 88e12, PCIE_4),
    "4070": Device("RTX 4070", 12_282 * MIB, 58e12, PCIE_4),
    "4060 ti": Device("RTX 4060 Ti", 16_380 * MIB, 44e12, PCIE_4),
    "3090": Device("RTX 3090", 24_576 * MIB, 71e12, PCIE_4),
    "3090 ti": Device("RTX 3090 Ti", 24_564 * MIB, 80e12, PCIE_4),
    "3080": Device("RTX 3080", 10_240 * MIB, 60e12, PCIE_4),
    "3060": Device("RTX 3060", 12_288 * MIB, 25e12, PCIE_4),
}
KEPT_BACK = 2e9  # bytes of a GPU that a run cannot have: the driver's context, NCCL's buffers
FRAGMENTS = 0.06  # share of the memory that the allocator loses to fragmentation


# words in GPUs' names that tell none from another
SAY_NOTHING = re.compile(r"nvidia|geforce|rtx|tesla|quadro|gpu|sxm\d?|hbm\d?e?|generation|blackwell|workstation|server|edition")


def find_gpu(name: str) -> Device:
    """Return the GPU that its users or its driver call `name`: RTX 4090, rtx4090, 4090, NVIDIA H100 80GB HBM3, a100-40gb.

    An amount of memory in the name replaces the usual one. Raises ValueError for a name that GPUS does not have.
    """
    spaced = re.sub(
        r"(?<=\d)(?=ti\b|super\b|tisuper\b|ada\b|nvl\b|pcie\b)|(?<=rtx)|(?<=ti)(?=super)", " ", re.sub(r"[-_/]", " ", name.lower())
    )
    words = {word for word in re.sub(r"(\d) (gb|gib)\b", r"\1gb", spaced).split() if not SAY_NOTHING.fullmatch(word)}
    sizes = {word for word in words if re.fullmatch(r"\d+gb", word)}
    for known, device in GPUS.items():
        if set(known.split()) == words - sizes:
            memory = max((int(size.removesuffix("gb")) * 2**30 for size in sizes), default=device.memory)
            is_usual = abs(memory / device.memory - 1) < 0.1 or known == "gh200"  # whose name says its host's memory
            return device if is_usual else with_memory(device, memory)
    raise ValueError(
        f"--gpu={name} is not one of the GPUs whose speed is known here; give its memory instead: --gpu_memory=24 (GB). "
        f"Known: {', '.join(device.name for device in GPUS.values())}; here: this machine"
    )


def with_memory(device: Device, memory: float) -> Device:
    """Return a GPU like `device` with so many bytes of memory."""
    return replace(device, name=f"{device.name} with {memory / 2**30:g} GB", memory=memory)


def gpu_with_memory(memory: float) -> Device:
    """Return a GPU of `memory` bytes as fast as the one of GPUS whose memory is nearest."""
    nearest = min(GPUS.values(), key=lambda device: abs(device.memory - memory))
    return replace(nearest, name=f"GPU with {memory / 2**30:g} GB (assumed as fast as {nearest.name})", memory=memory)


def device_of(gpu: str | None, memory: float | None) -> Device:
    """Return the GPU that --gpu and --gpu_memory, in GB, describe."""
    if memory is None:
        return find_gpu(gpu or "b200")
    if not 1 <= memory <= 4096:
        raise ValueError(f"--gpu_memory should be the GB of one GPU, saw {memory:g}")
    return with_memory(find_gpu(gpu), memory * 2**30) if gpu else gpu_with_memory(memory * 2**30)


OF_HOST = 0.9  # share of a host's free memory that what is offloaded may take


def free_on_host() -> float:
    """Return the bytes of this machine's memory, or of the part that a container or a job may take, that are free, less a margin."""
    return OF_HOST * min(psutil.virtual_memory().available, *_left_by_cgroups())


def _left_by_cgroups() -> Iterator[float]:
    """Yield how many bytes the control groups of this process leave to it, infinity where they have no limit."""
    yield math.inf
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # another version of control groups; "max" is no limit
            yield int((CGROUPS / limit).read_text(encoding="utf-8")) - int((CGROUPS / used).read_text(encoding="utf-8"))


def this_machine(ranks: int) -> Device:
    """Return what each of `ranks` ranks on this machine has: its GPU, or without one an equal share of the free memory.

    A GPU that GPUS does not have is taken to be as fast as an A100.
    """
    import torch  # in here: to look a GPU up by its name nothing is imported that takes long

    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return Device("CPU", psutil.virtual_memory().available / ranks, 1e12, 1e9)
    properties = torch.cuda.get_device_properties(0)
    try:
        known = find_gpu(properties.name)
    except ValueError:
        known = GPUS["a100"]
    return replace(known, name=properties.name, memory=properties.total_memory)
