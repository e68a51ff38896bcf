"""Compiles DeepSpeed's Adam for the CPU, which offload uses, when a run first wants it, and loads it."""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from deepspeed.ops.adam.cpu_adam import CPUAdamBuilder

from posttrain.common.terminal import say

NAME = CPUAdamBuilder.NAME
PACKAGES = {"c++": "Debian: g++", "Python.h": "Debian: python3-dev"}


def load_cpu_adam() -> None:
    """Load the compiled code that DeepSpeedCPUAdam uses; where there is none yet, one process of each host compiles it first.

    Call it before ranks wait for each other: compiling takes a minute or several. Raises ValueError if it cannot be compiled.
    """
    if NAME in CPUAdamBuilder._loaded_ops:
        return
    folder = ops_folder() / NAME
    if not _library(folder).is_file():
        with _only_one_process(folder):
            if not _library(folder).is_file():
                _compile(folder)
    # not by DeepSpeed's builder: it would wait for ever for the lock file of a process that was killed, and wants a compiler even now
    CPUAdamBuilder._loaded_ops[NAME] = _imported(_library(folder))


def ops_folder() -> Path:
    """The folder for compiled code of these versions and this kind of CPU: in TORCH_EXTENSIONS_DIR, this environment, or the user's cache.

    DeepSpeed's own is the user's, with names that tell no versions, so that two environments of one user break each other.
    """
    kind = hashlib.sha256(_cpu().encode()).hexdigest()[:8]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = f"torch{version('torch')}-deepspeed{version('deepspeed')}-python{python}-{platform.machine()}-{kind}"
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given) / versions
    own = Path(sys.prefix) / "torch_extensions" / versions
    if sys.prefix != sys.base_prefix and (own.is_dir() or os.access(sys.prefix, os.W_OK)):
        return own
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain" / "torch_extensions" / versions


def _cpu() -> str:
    """What the CPU can do, for which the code is compiled: a file system may be shared by hosts of several kinds."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M):
            return " ".join(sorted(found[1].split()))
    return platform.processor()


def _library(folder: Path) -> Path:
    return folder / f"{NAME}.so"


def _imported(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _only_one_process(folder: Path) -> Iterator[None]:
    """Let one process of this host in at a time; the kernel frees the lock of one that dies. Raises ValueError for a read-only folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{NAME}.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"DeepSpeed's CPU Adam, which offload uses, cannot be compiled into {folder.parent}: {error.strerror}; set "
            "TORCH_EXTENSIONS_DIR to a folder that can be written to"
        ) from None
    with lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks; the compiled folder appears whole all the same
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(folder: Path) -> None:
    """Compile in a folder of this process's, then rename it, so that others see it whole or not at all, locks or none."""
    _check_tools()
    from torch.utils import cpp_extension  # it takes setuptools along, for which other runs need not wait

    say(f"compiling  DeepSpeed's CPU Adam, which offload uses, into {folder}: once, a minute or more")
    place = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    (place / NAME).mkdir()
    libraries = cpp_extension.TORCH_LIB_PATH
    try:
        cpp_extension.TORCH_LIB_PATH = shlex.quote(libraries)  # torch 2.13 hands a path with a space to the linker as several words
        with _environment(TORCH_EXTENSIONS_DIR=str(place), PATH=_path_with_ninja()):
            CPUAdamBuilder().load(verbose=False)
        try:
            (place / NAME).rename(folder)
        except OSError:
            if not _library(folder).is_file():  # else another process was first
                raise
    except (RuntimeError, OSError) as error:
        raise ValueError(f"DeepSpeed's CPU Adam, which offload uses, cannot be compiled: {_last_lines(str(error))}") from error
    finally:
        cpp_extension.TORCH_LIB_PATH = libraries
        CPUAdamBuilder._loaded_ops.pop(NAME, None)
        shutil.rmtree(place, ignore_errors=True)


def _check_tools() -> None:
    """Raises ValueError, naming what to install, without a C++ compiler or Python's headers."""
    compiler = os.environ.get("CXX", "c++")
    missing = None if shutil.which(shlex.split(compiler)[0]) else (compiler, "c++")
    if not missing and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing = ("Python.h", "Python.h")
    if missing:
        raise ValueError(
            f"the ds_config offloads the optimizer, for which DeepSpeed compiles code, and {socket.gethostname()} has no {missing[0]}; "
            f"install it ({PACKAGES[missing[1]]}), or take a ds_config without offload_optimizer"
        )


def _path_with_ninja() -> str:
    """PATH with the ninja of this environment, which may not have been activated."""
    import ninja

    return os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _last_lines(text: str) -> str:
    """The end of the compiler's output, in which the cause stands."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\b(error|cannot find|undefined reference)\b", line)]
    return "; ".join(line[-200:] for line in lines[-3:] or text.strip().splitlines()[-3:])
