"""Runs a script on every rank, and turns its errors into one message and an exit code."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from torch import distributed as dist

from posttrain.common import terminal
from posttrain.common.errors import is_mistake
from posttrain.parallel import stopping, watchdog

MISTAKE = 2  # exit code: the user's mistake, so the same command would fail again


def run_script(script: Callable[[], None]) -> None:
    """Run a script's main function on this rank, then exit. A user's mistake prints one message, from rank 0, and all ranks exit non-zero.

    The exit skips the interpreter's shutdown: in it a process group's threads may end in std::terminate (seen with gloo, torch 2.13), or
    hang if another rank is gone, although all work is done.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        script()
    except KeyboardInterrupt:
        terminal.stop_live()
        os._exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        _fail(rank, f"error: {error}", traceback.format_exc(), MISTAKE if is_mistake(error) else 1)
    except Exception:
        details = traceback.format_exc()
        if gone := watchdog.explain():  # this failure only follows from the loss of another rank
            terminal.say_error(gone)
            os._exit(watchdog.LOST)
        _fail(rank, details, "")
    if dist.is_initialized():
        dist.barrier()
        watchdog.close()
        dist.barrier()
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr, terminal.console.file):
        with contextlib.suppress(OSError):
            stream.flush()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        stopping.tell_that_all_is_well()
    os._exit(0)


def _fail(rank: int, message: str, details: str, code: int = 1) -> NoReturn:
    """Print the error and exit. Rank 0 does so at once, others after 5 s: mostly all fail alike, and the launcher ends them before that."""
    watchdog.fall_silent()
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"rank {rank}: {message}"
    terminal.stop_live()
    terminal.say_error(message)
    if details and os.environ.get("POSTTRAIN_TRACEBACK"):
        terminal.say_error(details)
    if code != MISTAKE:
        terminal.show_noise()
    os._exit(code)
