"""Notices when a run should save and stop: at a signal, when its launcher is gone, or shortly before its job's time limit.

One rank that wants to stop suffices: its request is part of the all-reduce of the step's metrics, so all ranks stop after the same step.
"""

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_REQUEST = 2.0  # seconds within which signals count as one: Ctrl-C reaches a rank twice, as SIGINT and as the launcher's SIGTERM
# names a file that one rank of each host creates once all ranks have finished, or saved and stopped; set by launch/supervise.py, which
# cannot rely on exit codes: DeepSpeed's launchers, once signalled, exit with 1 or not at all
ALL_IS_WELL = "POSTTRAIN_ALL_IS_WELL"
STARTED = "POSTTRAIN_STARTED"  # when the job began, in seconds since 1970; set by launch/supervise.py, restarts do not change it
# how many of a rank's ancestors belong to its launcher: the deepspeed command starts an inner one, which outlives it
LAUNCHERS = {"deepspeed": 2, "torchrun": 1, None: 0}
OVER_SSH = "POSTTRAIN_OVER_SSH"  # set by launch/multinode.py if output goes through ssh to the host where the run was started


class StopRequest:
    """Whether this rank wants the run to stop. A first signal asks it to; a second one, at least 2 s later, ends the process at once."""

    def __init__(self, time_limit: float, launcher: str | None):
        """`time_limit`: seconds that the job may take, 0 for no limit. `launcher`: see `Launch`; the run stops once that is gone."""
        used = max(time.time() - float(os.environ.get(STARTED, time.time())), 0.0)
        self.ends = time.monotonic() + time_limit - used if time_limit else None  # whatever the wall clock does from here on
        self.launchers = AT_START[: LAUNCHERS[launcher]]
        self.reserve = 0.0  # seconds to keep free before the time limit, for a step and a save
        self.signal: int | None = None
        self._listen()

    def _listen(self) -> None:
        """Read signals from a pipe, in a thread: Python runs handlers on the main thread only, which may be stuck in an operation."""
        ours = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup has SIGHUP ignored
        heard, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in ours:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._read_signals, args=(heard, set(ours)), name="signals", daemon=True).start()

    def _read_signals(self, heard: int, ours: set[int]) -> None:
        """Note the first signal that the pipe `heard` brings; exit at the next, unless it belongs to the same request."""
        asked_at = 0.0
        while True:
            number = os.read(heard, 1)[0]
            if number not in ours:
                continue
            if self.signal is None:
                self.signal, asked_at = number, time.monotonic()
            elif time.monotonic() - asked_at > SAME_REQUEST:
                os._exit(128 + number)

    def expect(self, step_seconds: float, save_seconds: float) -> None:
        """Set how long a step and a save are likely to take: the run stops while its time limit still leaves twice as much."""
        self.reserve = 2 * step_seconds + 2 * save_seconds + 5

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop; None if it does not."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if _ancestors()[: len(self.launchers)] != self.launchers:
            return "the launcher has gone"
        if OVER_SSH in os.environ and _output_is_unread():
            return "the host that started it has gone"
        if self.ends is not None and time.monotonic() + self.reserve > self.ends:
            return "the time limit is near"
        return None


def _output_is_unread() -> bool:
    """Whether the pipe that is this process's standard output has lost its reader."""
    poll = select.poll()
    poll.register(sys.__stdout__.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def tell_that_all_is_well() -> None:
    """Tell launch/supervise.py, if it started this run, that the run ended in order. The first rank of each host calls it, at its end."""
    if path := os.environ.get(ALL_IS_WELL):
        Path(path).touch()


def _ancestors() -> tuple[int, int]:
    """Returns the process ids of our parent and of its parent."""
    parent = os.getppid()
    try:
        return parent, psutil.Process(parent).ppid()
    except psutil.NoSuchProcess:  # it has just ended
        return os.getppid(), 0


AT_START = _ancestors()
