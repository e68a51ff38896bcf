"""Reads from the environment which rank this process is, as the launcher that started it says: deepspeed, torchrun or another.

It imports the standard library only: a wrong environment is said before torch is imported.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARED_MEMORY = 512 * 2**20  # bytes of /dev/shm that suffice for NCCL's buffers; containers start with 64 MiB
LEFT_OVER = "If they are left over, unset them: one process needs none of them"


class Launch(NamedTuple):
    """This process among those that a launcher started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the ranks of this machine, which is the GPU that it takes
    local_size: int = 1  # ranks on this machine, as far as the launcher says
    launcher: str | None = None  # "deepspeed", "torchrun", or None: nobody, or one that does not stay as this process's parent
    address: str = "127.0.0.1"  # where rank 0 listens
    port: int = 0  # 0: any that is free
    is_alone_here: bool = False  # nothing said which rank of its machine this is: it must be the only one there
    meets_at_agent: bool = False  # torchrun itself listens at the address; otherwise rank 0 does
    attempt: str = ""  # torchrun's number of this start: its restarts meet at the same place

    def as_environment(self) -> dict[str, str]:
        """Return the variables that libraries read, those that were missing included."""
        values = {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": self.local_rank}
        return {name: str(value) for name, value in (values | {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}).items()}


def read_launch() -> Launch:
    """Return this process's place among the ranks, by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and the launcher's own.

    An empty variable counts as unset, and without RANK none of the others counts: this process is then the only one.
    Raises ValueError for variables that are wrong or do not belong together.
    """
    rank = _number("RANK")
    if rank is None:
        return Launch()
    world_size = _number("WORLD_SIZE") or 1
    if rank >= world_size:
        raise ValueError(
            f"the environment says RANK={rank} and WORLD_SIZE={os.environ.get('WORLD_SIZE') or '(unset)'}, but ranks count from 0 to "
            f"WORLD_SIZE - 1. A launcher, such as torchrun or deepspeed, sets both. {LEFT_OVER}"
        )
    launcher = "torchrun" if os.environ.get("TORCHELASTIC_RUN_ID") else "deepspeed" if os.environ.get("LOCAL_SIZE") else None
    local_rank, local_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE" if launcher == "torchrun" else "LOCAL_SIZE") or 1
    if world_size == 1:
        return Launch(local_rank=local_rank or 0, launcher=launcher)
    address, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT")
    if missing := [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]:
        raise ValueError(
            f"the environment says RANK={rank} and WORLD_SIZE={world_size}, but not {' and '.join(missing)}, the host and port of rank 0. "
            f"A launcher, such as torchrun or deepspeed, sets all of them. {LEFT_OVER}"
        )
    if local_rank is None and (_number("PET_NPROC_PER_NODE", any_text=True) or 1) > 1:
        raise ValueError(
            f"PET_NPROC_PER_NODE={os.environ['PET_NPROC_PER_NODE']} asks for several ranks in this pod, and LOCAL_RANK is not set, which "
            "says which of them this is. torchrun starts them and sets it: begin the container's command with torchrun instead of python"
        )
    here = Launch(rank, world_size, local_rank or 0, local_size, launcher, address or "", port or 0, is_alone_here=local_rank is None)
    if launcher != "torchrun":
        return here
    meets_at_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return here._replace(meets_at_agent=meets_at_agent, attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", ""))


def keep_visible_gpus() -> str | None:
    """Set CUDA_VISIBLE_DEVICES to what it was when DeepSpeed's launcher was started, and return it; None where there is nothing to do.

    With --num_gpus the launcher (0.19.8) puts the first GPUs of the machine in its place: of somebody who gave this run GPUs 4 and 5
    because 0 and 1 are another's. Call it before torch looks for GPUs.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):  # no /proc, or one in which other processes are hidden
        with open(f"/proc/{os.getppid()}/stat", encoding="utf-8", errors="replace") as file:
            launcher = int(file.read().rpartition(")")[2].split()[1])  # the parent's parent, which has started it for this machine
        with open(f"/proc/{launcher}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read().split("\0")
        with open(f"/proc/{launcher}/environ", encoding="utf-8", errors="replace") as file:
            given = dict(line.split("=", 1) for line in file.read().split("\0") if "=" in line).get(VISIBLE)
        is_deepspeed = any(word.endswith(("/deepspeed", "deepspeed.launcher.runner", "launcher/runner.py")) for word in words[:4])
        if given and given != os.environ.get(VISIBLE) and is_deepspeed and any(word.startswith("--num_gpus") for word in words):
            os.environ[VISIBLE] = given
            return given
    return None


def take_gpu(device: str) -> str:
    """Let this process see only the GPU that `device` names, as cuda:1, and return "cuda"; another device is returned as it is.

    Libraries ask for the free memory of the current GPU, which in a thread of theirs is the first one. Call it before torch is imported.
    Raises ValueError for a number that is none of the GPUs of CUDA_VISIBLE_DEVICES.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number:
        return device
    seen = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    if not number.isdigit() or (seen and int(number) >= len(seen)):
        expected = f"from 0 to {len(seen) - 1}, of {VISIBLE}={os.environ[VISIBLE]}" if seen else "from 0 on"
        raise ValueError(f"--device {device} names no GPU; expected cuda or cuda:N, with N {expected}")
    os.environ[VISIBLE] = seen[int(number)] if seen else number
    return "cuda"


def launch_or_alone() -> Launch:
    """Return what `read_launch` does, or a process alone where the environment is wrong, for which the commands that train raise."""
    try:
        return read_launch()
    except ValueError:
        return Launch()


def _number(name: str, any_text: bool = False) -> int | None:
    """Return an environment variable as a number; None if it is unset, empty, or with `any_text` no number. Raises ValueError."""
    value = os.environ.get(name)
    if value and not value.isdigit() and not any_text:
        raise ValueError(
            f"the environment says {name}={value}, which should be a number that a launcher, such as torchrun or deepspeed, sets. Start "
            f"the command with one, or unset {name}"
        )
    return int(value) if value and value.isdigit() else None
