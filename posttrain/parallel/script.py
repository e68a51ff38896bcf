"""The way into a script and out of it, on every rank."""

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

MISTAKE = 2  # exit code: the command or what it names is wrong, and would be again


def run_script(script: Callable[[], None]) -> None:
    """Run a script's main function on this rank, and leave. A user's mistake ends with one message from rank 0 and a non-zero exit on all.

    Leaving skips the interpreter's shutdown: there a process group's threads may end in std::terminate (seen with gloo, torch 2.13), or
    hang where a peer is gone, although all work is done.
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
        if gone := watchdog.explain():  # what failed here is what another rank's end has caused
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
    """Rank 0 speaks. Others mostly failed alike and are ended by the launcher while they wait; one that failed alone speaks after all."""
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
