"""Runs a script, on one rank or many, and turns its errors into one message and an exit code.

It imports the standard library only: what a script lacks, and what is wrong with its command line, is said before torch is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import locale
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn, TextIO

from posttrain.common import places
from posttrain.common.visible import visible
from posttrain.parallel.launched import VISIBLE, keep_visible_gpus, launch_or_alone

MISTAKE = 2  # exit code: the user's mistake, so the same command would fail again
OLDEST_PYTHON = (3, 11)
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/dev/dri", "/dev/accel")  # one is there where there is a GPU


def run_script(script: Callable[[], None]) -> None:
    """Run a script's main function on this rank, then exit. A user's mistake prints one message, from rank 0, and all ranks exit non-zero.

    The exit skips the interpreter's shutdown: in it a process group's threads may end in std::terminate (seen with gloo, torch 2.13), or
    hang if another rank is gone, although all work is done.
    """
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(_too_old())
    _open_closed_streams()
    _use_utf8()
    warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]
    _read_secrets()
    if os.getpid() == 1:  # of a container: without a handler of its own such a process gets no signal
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    here = launch_or_alone()
    rank = here.rank
    if sys.flags.optimize > 1:
        without = "Python runs with -OO or PYTHONOPTIMIZE=2, that is, without the docstrings that transformers reads"
        _fail(rank, f"error: {without}: leave it out, or use -O", "", MISTAKE)
    if (gpus := keep_visible_gpus()) and rank == 0:
        print(f"note: {VISIBLE}={gpus} is kept, which deepspeed --num_gpus would ignore", flush=True)
    if not any(map(os.path.exists, GPU_FILES)):  # else DeepSpeed 0.19.8 warns on every rank that it takes the CPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        script()
    except KeyboardInterrupt:
        _stop_live()
        os._exit(128 + signal.SIGINT)
    except SystemExit as error:  # argparse's --help and its errors
        _leave(rank, error)
    except BrokenPipeError:  # what it was printing to has ended, such as head
        os._exit(1)
    except ModuleNotFoundError as error:
        if importlib.util.find_spec((error.name or "").partition(".")[0] or "posttrain") is None:
            _fail(rank, places.missing_package(error), traceback.format_exc(), MISTAKE)
        _fail(rank, traceback.format_exc(), "")
    except (ValueError, OSError) as error:
        from posttrain.common.errors import described, is_mistake

        _fail(rank, f"error: {described(error)}", traceback.format_exc(), MISTAKE if is_mistake(error) else 1)
    except Exception:
        details = traceback.format_exc()
        watchdog = sys.modules.get("posttrain.parallel.watchdog")
        if watchdog and (gone := watchdog.explain()):  # this failure only follows from the loss of another rank
            _say_error(gone)
            os._exit(watchdog.LOST)
        _fail(rank, details, "")
    _part()
    _flush()
    if here.local_rank == 0 and "POSTTRAIN_ALL_IS_WELL" in os.environ:  # launch/supervise.py started it
        from posttrain.parallel import stopping

        stopping.tell_that_all_is_well()
    os._exit(0)


def is_rank_0() -> bool:
    """Whether this process is the first rank, or the only one; known before there is a process group."""
    return launch_or_alone().rank == 0


def _open_closed_streams() -> None:
    """Connect standard streams that were closed, as by `>&-`, to /dev/null: else the next file opened would be taken for one of them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115


def _read_secrets() -> None:
    """Set the environment variables of the file that launch/multinode.py has written on this host, if it has."""
    with contextlib.suppress(OSError), open(os.environ.get("POSTTRAIN_SECRETS", ""), encoding="utf-8") as file:
        os.environ |= json.load(file)


def _use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where the locale's encoding is another, and print what cannot be encoded as escapes.

    Libraries read files in the locale's encoding: torch 2.13 its own templates, which are UTF-8, so that it fails under zh_CN.GBK.
    """
    is_utf8 = sys.flags.utf8_mode or locale.getencoding().lower().replace("-", "") == "utf8"
    if not is_utf8 and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # for what this process starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # of a stream under which the file was exchanged for one that cannot seek
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8  # ty: ignore[missing-attribute]


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Print a warning in one line, as `warnings.showwarning`; it may quote a file of somebody else's."""
    with contextlib.suppress(OSError, ValueError):
        print(visible(f"warning  {' '.join(str(message).split())} ({category.__name__} at {filename}:{lineno})"), file=file or sys.stderr)


def _part() -> None:
    """Leave the process group, if there is one, together with all other ranks."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_initialized():
        from posttrain.parallel import watchdog

        dist.barrier()
        watchdog.close()
        dist.barrier()
        dist.destroy_process_group()


def _flush() -> None:
    """Flush what was printed; the terminal may be gone."""
    terminal = sys.modules.get("posttrain.common.terminal")
    for stream in (sys.stdout, sys.stderr, *([terminal.console.file] if terminal else [])):
        with contextlib.suppress(OSError):
            stream.flush()


def _leave(rank: int, error: SystemExit) -> NoReturn:
    """Exit as the interpreter would: with the code, or with 1 after printing the text that stands in its place."""
    if isinstance(error.code, str) and rank == 0:
        _say_error(error.code)
    _flush()
    os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))


def _fail(rank: int, message: str, details: str, code: int = 1) -> NoReturn:
    """Print the error and exit. Rank 0 does so at once, others after 5 s: mostly all fail alike, and the launcher ends them before that."""
    if watchdog := sys.modules.get("posttrain.parallel.watchdog"):
        watchdog.fall_silent()
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"rank {rank}: {message}"
    _stop_live()
    _say_error(message)
    if details and os.environ.get("POSTTRAIN_TRACEBACK"):
        _say_error(details)
    if code != MISTAKE and (terminal := sys.modules.get("posttrain.common.terminal")):
        terminal.show_noise()
    os._exit(code)


def _stop_live() -> None:
    """Remove the live progress line, if one may be there."""
    if terminal := sys.modules.get("posttrain.common.terminal"):
        terminal.stop_live()


def _say_error(text: str) -> None:
    """Print to the error stream; where libraries' output is kept away from the terminal, posttrain.common.terminal knows the way."""
    if terminal := sys.modules.get("posttrain.common.terminal"):
        terminal.say_error(text)
        return
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        os.write(sys.stderr.fileno(), f"{visible(text)}\n".encode())


def _too_old() -> str:
    """Return what to do about a Python that cannot run this package."""
    seen, needed = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
    how = f"source {places.PACKAGE.parent / 'launch' / 'env.sh'}" if places.is_checkout() else "python3.11 -m pip install posttrain-*.whl"
    return f"error: this is Python {seen} ({sys.executable}); posttrain needs {needed} or newer. Take one that has its packages:\n    {how}"
