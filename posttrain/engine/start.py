"""Starts a rank: checks versions and devices, shares out cores, sets up the process group, and silences libraries."""

import logging
import os
import shutil
import warnings
from importlib.metadata import version

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from packaging.version import Version
from torch import distributed as dist

from posttrain.common import gpus
from posttrain.common.terminal import say
from posttrain.parallel import ranks
from posttrain.parallel.launched import SHARED_MEMORY, VISIBLE, read_launch

# 0.18.3 to 0.19.5 divide gradients by the accumulation count twice below ZeRO-3; 0.18.2 is wrong at ZeRO-2 (DeepSpeed #7718, #8224).
# Adam's steps do not show it; clipping and gradient norms do.
OLDEST_DEEPSPEED = "0.19.8"
LARGE_PINNED = 64  # MB; larger pieces of pinned memory are not rounded up


def check_versions() -> None:
    """Raises ValueError for a version of DeepSpeed that computes wrong gradients."""
    if Version(version("deepspeed")) < Version(OLDEST_DEEPSPEED):
        raise ValueError(
            f"deepspeed {version('deepspeed')} scales gradients wrongly under accumulation; "
            f"{OLDEST_DEEPSPEED} or newer is needed: pip install -c constraints.txt deepspeed"
        )


def start_distributed(watchdog_seconds: float = 0.0, deterministic: bool = False) -> torch.device:
    """Select this rank's device, set up the process group, start the watchdog, and return the device. All ranks.

    With `deterministic` every operation gives the same bits each time, or raises RuntimeError where it cannot.
    Raises ValueError if there are too few GPUs, or none that can be used, or if ranks are missing or cannot connect to each other.
    """
    accelerator, here = get_accelerator(), read_launch()
    if accelerator.device_name() == "cpu" and (reason := gpus.why_unusable()):
        raise ValueError(f"{reason}. To train on the CPU all the same: export DS_ACCELERATOR=cpu")
    if accelerator.device_name() != "cpu":
        check_devices(here.local_size, torch.cuda.device_count(), here.launcher)
        if here.local_size > 1 and here.local_rank == 0:
            warn_of_little_shared_memory("/dev/shm")
    os.environ |= here.as_environment()  # DeepSpeed and others read it, too
    settle_allocator()
    if deterministic:
        compute_deterministically()
    accelerator.set_device(here.local_rank)
    share_cores(here.local_size)
    if accelerator.device_name() == "cpu":
        if here.rank == 0 and here.local_size > (cores := len(os.sched_getaffinity(0))):
            say(f"warning    {here.local_size} ranks share {cores} cores: results are right, but training is slow")
        _limit_kernel_caches()
    _quiet_libraries()
    device = current_device()
    if not dist.is_initialized():
        ranks.connect(accelerator.communication_backend_name(), device, watchdog_seconds, here)
    # DeepSpeed 0.19.8 would compile and load its all-reduce for CPUs, of which only its inference makes use; each rank's buffers of 66 MB
    # would stay in /dev/shm for good
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    return device


def settle_allocator() -> None:
    """Set torch's allocators, unless the environment does: memory of GPUs in segments that grow, and pinned memory of the size asked for.

    Nearly every micro-batch has another length, for which memory in pieces of fixed sizes fragments. What is offloaded is pinned in few
    large pieces, each of which torch (2.13) would round up to a power of two. Call it before the first memory of a GPU is taken.
    """
    if "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ:
        return
    newer = Version(torch.__version__) >= Version("2.13")  # earlier ones refuse a setting that they do not know
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True" + (f",pinned_max_round_threshold_mb:{LARGE_PINNED}" if newer else "")


def compute_deterministically() -> None:
    """Let torch take algorithms only that add up in the same order each time. Call it before the first product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which torch refuses cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a search for reads of memory that nobody wrote; it takes time


def share_cores(local_size: int) -> None:
    """Divide the cores among this machine's ranks: otherwise each would start a thread on every core, as for Adam on offloaded states."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))


def warn_of_little_shared_memory(folder: str) -> None:
    """Print how to get more where `folder`, /dev/shm, is too small for the buffers of several GPUs, without which NCCL ends the run."""
    size = shutil.disk_usage(folder).total if os.path.isdir(folder) else 0
    if size < SHARED_MEMORY:
        say(
            f"warning    {folder} has {size / 1e6:.0f} MB, of which NCCL may need {SHARED_MEMORY / 1e6:.0f}. In a container give it more: "
            "docker run --shm-size=16g or --ipc=host, in Kubernetes an emptyDir with medium: Memory"
        )


def _limit_kernel_caches() -> None:
    """Limit the caches of bfloat16 kernels on the CPU to 64 entries. Call it before the first matrix product.

    oneDNN, and torch (2.13) above it, keep 1,024, each for one number of rows. Nearly every micro-batch has another number, so the caches
    grew to gigabytes without a gain in speed: the layers of one micro-batch share some twenty kernels.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _quiet_libraries() -> None:
    """Silence libraries' progress messages; most warnings, and all errors, stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # 0.8.5 warns about every kind of device whose kernels are not installed
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed 0.19.8 calls deprecated collectives


def current_device() -> torch.device:
    """Returns this rank's device."""
    return torch.device(get_accelerator().current_device_name())


def check_devices(wanted: int, visible: int, launcher: str | None) -> None:
    """Raises ValueError if more GPUs are wanted on this machine than are visible."""
    if wanted > visible:
        option = "--nproc_per_node" if launcher == "torchrun" else "--num_gpus"
        given = os.environ.get(VISIBLE)
        why = f" ({VISIBLE}={given}; of a list, what follows a GPU that is not there does not count)" if given else ""
        fix = f"use {option} {visible} or fewer" if visible else "see what nvidia-smi says"
        raise ValueError(f"{option} asks for {wanted} GPUs on this machine, {visible} are visible{why}; {fix}")
