"""Why a run should stop and be saved: a signal, a launcher that has gone, the end of its job's time.

One rank that wants to stop suffices: what it wants rides on the reduction of the step's metrics, so all ranks stop after the same step.
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
SAME_REQUEST = 2.0  # seconds: Ctrl-C in a terminal reaches a rank twice, as SIGINT and as the launcher's SIGTERM
# a file that one rank of each host makes once all ranks have finished, or saved and stopped; named by launch/supervise.py, which cannot
# go by exit codes: DeepSpeed's launchers, once they are signalled, end with 1 or not at all
ALL_IS_WELL = "POSTTRAIN_ALL_IS_WELL"
STARTED = "POSTTRAIN_STARTED"  # when the job began, in seconds since 1970; set by launch/supervise.py, whose restarts do not begin it anew
OVER_SSH = "POSTTRAIN_OVER_SSH"  # set by launch/multinode.py: what is printed goes through ssh to the host where the run was started


class StopRequest:
    """Whether this rank wants the run to stop. The first signal asks; a second one, later, exits at once."""

    def __init__(self, time_limit: float, is_launched: bool):
        """`time_limit`: seconds that the job may last, 0 for no limit. `is_launched`: started by a launcher, without which it stops."""
        began = float(os.environ.get(STARTED, time.time()))
        self.ends = began + time_limit if time_limit else None
        self.launchers = AT_START if is_launched else None
        self.reserve = 0.0  # seconds that a step and a save take
        self.signal: int | None = None
        self._listen()

    def _listen(self) -> None:
        """Signals through a pipe to a thread: Python runs a handler on the main thread only, which may be stuck in an operation."""
        ours = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup leaves SIGHUP
        heard, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in ours:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._wait, args=(heard, set(ours)), name="signals", daemon=True).start()

    def _wait(self, heard: int, ours: set[int]) -> None:
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
        """How long the next step and a save are likely to take: with a time limit the run stops while there is room for both."""
        self.reserve = 2 * step_seconds + 2 * save_seconds + 5

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop; None to go on."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self.launchers is not None and _ancestors() != self.launchers:
            return "the launcher has gone"
        if OVER_SSH in os.environ and _nobody_reads():
            return "the host that started it has gone"
        if self.ends is not None and time.time() + self.reserve > self.ends:
            return "the time limit is near"
        return None


def _nobody_reads() -> bool:
    """Whether the pipe that this process prints to has lost its reader."""
    poll = select.poll()
    poll.register(sys.__stdout__.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def tell_that_all_is_well() -> None:
    """Tell this host's supervisor, where there is one, that nothing is lost. The first rank of each host, at its end."""
    if path := os.environ.get(ALL_IS_WELL):
        Path(path).touch()


def _ancestors() -> tuple[int, int]:
    """This process's parent, DeepSpeed's inner launcher, and its parent, the deepspeed command: the inner one outlives it."""
    parent = os.getppid()
    try:
        return parent, psutil.Process(parent).ppid()
    except psutil.NoSuchProcess:  # it has just ended
        return os.getppid(), 0


AT_START = _ancestors()
