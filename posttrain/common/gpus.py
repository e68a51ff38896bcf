"""Whether the GPUs of this machine can be used, and if not, why: what would be slow on its processors alone is not begun in silence."""

import os
import re
from pathlib import Path

import torch

from posttrain.common import terminal
from posttrain.common.errors import first_line

DRIVER, CONTROL = Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl")  # a container without GPUs lacks the second


def usual_device() -> str:
    """Return where models compute whose device is not asked for, "cuda" or "cpu"; says why where there are GPUs that cannot be used."""
    if torch.cuda.is_available():
        return "cuda"
    if reason := why_unusable():
        terminal.say(f"warning: the CPU computes, since {reason}")
    return "cpu"


def why_unusable() -> str | None:
    """Return why torch cannot use the NVIDIA GPUs whose driver this machine has, and what to do.

    Returns None where it can, where there are none, and where the environment asks for the CPU.
    """
    asked = os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if asked or torch.cuda.is_available() or not (DRIVER.exists() or CONTROL.exists()):
        return None
    version = re.search(r"\d{3}\.[\d.]+", DRIVER.read_text(encoding="utf-8", errors="replace")) if DRIVER.exists() else None
    who = f"this machine has an NVIDIA driver{f' ({version[0]})' if version else ''}, but torch {torch.__version__}"
    if not CONTROL.exists():
        return f"{who} sees no GPU: start the container with --gpus all"
    if torch.version.cuda is None:
        return f"{who} is a build without CUDA: rm -r .venv, and set up again without an index of CPU builds"
    try:
        torch.cuda.init()
        found = "it finds none"
    except RuntimeError as error:
        found = first_line(error)
    older = "https://download.pytorch.org/whl/cu126"
    return (
        f"{who}, which is for CUDA {torch.version.cuda}, cannot use its GPUs ({found}). Take a newer driver (580 or newer for CUDA 13), "
        f"or a build for an older CUDA: pip install torch=={torch.__version__.partition('+')[0]} --index-url {older}"
    )
