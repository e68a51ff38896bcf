"""Runs a launcher's command, stops it in order and restarts it: python launch/supervise.py COMMAND [--max_restarts=N]

A signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP) goes to the ranks, which save and stop; the exit code is then 0. A second one ends them at
once. (DeepSpeed's launcher does not pass SIGTERM on, and its inner launcher ends one rank after another.) If the command fails, and not
by a mistake in it, it is restarted up to N times and continues from the newest checkpoint.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__" and sys.argv[1:2] == ["--help"]:  # it needs no package
    print(__doc__.strip())
    sys.exit()

import psutil

MISTAKE = 2  # exit code of the scripts for an error that a restart would only repeat
PAUSE = 3  # seconds before a restart
GRACE = 600  # seconds for ranks that outlive their launcher: they notice its end, save, and stop by themselves
TORCHRUN = "TORCHELASTIC_RUN_ID"  # torchrun sets it for its ranks
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Supervisor:
    """Runs a command in a session of its own, passes signals on to its ranks, and restarts it after a failure.

    `reach` sends a signal to ranks on other hosts; without it signals go to the ranks in the command's session. Whether ranks on other
    hosts stopped in order is known by the command's exit code.
    """

    def __init__(self, command: list[str], max_restarts: int, reach: Callable[[int], None] | None = None):
        self.command, self.max_restarts, self.reach, self.asked = command, max_restarts, reach, 0
        self.child: subprocess.Popen | None = None

    def run(self) -> int:
        """Run the command until it ends well, is stopped, or has no restarts left; returns the exit code."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._pass_on)
        # a rank that stops in order makes this file, see posttrain/parallel/stopping.py
        self.well = Path(tempfile.mkdtemp(prefix="posttrain_supervise_")) / "all_is_well"
        # a job's time limit counts from here
        environment = {"POSTTRAIN_STARTED": str(time.time())} | os.environ | {"POSTTRAIN_ALL_IS_WELL": str(self.well)}
        try:
            return self._run(environment)
        finally:
            shutil.rmtree(self.well.parent, ignore_errors=True)

    def _run(self, environment: dict[str, str]) -> int:
        for restart in range(self.max_restarts + 1):
            self.well.unlink(missing_ok=True)  # left by the start before, if ranks that outlived their launcher stopped in order
            # a session of its own: Ctrl-C in the terminal reaches the ranks once, through _pass_on
            self.child = subprocess.Popen(self.command, env=environment, start_new_session=True)
            if self.asked:  # a signal came while it was being started
                os.killpg(self.child.pid, signal.SIGTERM)
            code = self._wait()
            if code == 0 or self.asked or code == MISTAKE or restart == self.max_restarts:
                return code if code >= 0 else 128 - code
            print(f"supervise.py: exit code {code}; restart {restart + 1} of {self.max_restarts} in {PAUSE} s", file=sys.stderr, flush=True)
            time.sleep(PAUSE)
            if self.asked:
                return 0
        raise AssertionError("unreachable")

    def _wait(self) -> int:
        """Wait for the command and return its exit code; ranks that outlive their launcher get GRACE seconds to save and stop."""
        code, ranks = self.child.wait(), self._ranks()
        if ranks:
            deadline = time.monotonic() + GRACE
            while self._ranks() and time.monotonic() < deadline and self.asked < 2:
                time.sleep(0.2)
            code = code or 1
        self._end_what_is_left()
        return 0 if self.asked and self.well.exists() else code

    def _pass_on(self, number: int, frame) -> None:
        """Handle a signal: pass it on to the ranks; the third one kills all of the command's processes."""
        self.asked += 1
        if self.child is None:
            return
        if self.reach and self.asked < 3:
            self.reach(number)
            return
        ranks = self._ranks()
        for process in ranks if self.asked < 3 else self._session():
            try:
                process.send_signal(number if self.asked < 3 else signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        if not ranks and self.child.poll() is None:  # no rank has started yet: there is nothing to save
            os.killpg(self.child.pid, signal.SIGTERM)

    def _ranks(self) -> list[psutil.Process]:
        """The ranks among the command's processes.

        deepspeed's have the argument --local_rank, which in the launchers' is part of a longer one; torchrun's have its variables, and a
        parent, torchrun, which has not: what ranks start has inherited them.
        """
        session = self._session()
        started = {process.pid for process in session if TORCHRUN in _environment(process)}
        return [
            process
            for process in session
            if any(part.startswith("--local_rank=") for part in _command_line(process))
            or (process.pid in started and _parent(process) not in started)
        ]

    def _session(self) -> list[psutil.Process]:
        """All processes that the command has started, orphans included; torchrun's ranks have sessions of their own."""
        try:
            below = {process.pid for process in psutil.Process(self.child.pid).children(recursive=True)}
        except psutil.NoSuchProcess:
            below = set()
        return [process for process in psutil.process_iter() if process.pid in below or _session_of(process.pid) == self.child.pid]

    def _end_what_is_left(self) -> None:
        for process in self._session():
            if process.pid != self.child.pid:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue


def _session_of(pid: int) -> int | None:
    """The id of the process's session, None if it has ended."""
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _command_line(process: psutil.Process) -> list[str]:
    """The process's arguments; none if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _environment(process: psutil.Process) -> dict[str, str]:
    """The process's environment variables at its start; none if it has ended."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _parent(process: psutil.Process) -> int | None:
    """The process id of its parent; None if it has ended."""
    try:
        return process.ppid()
    except psutil.Error:
        return None


def split_restarts(arguments: list[str]) -> tuple[int, list[str]]:
    """Split --max_restarts=NUMBER off: returns the number (0 without it) and the other arguments. Raises ValueError for another form."""
    restarts = [argument for argument in arguments if argument.startswith("--max_restarts")]
    command = [argument for argument in arguments if argument not in restarts]
    value = restarts[-1].partition("=")[2] if restarts else "0"
    if not value.isdigit() or not command:
        raise ValueError(f"expected --max_restarts=NUMBER and a command, saw {' '.join(arguments)}")
    return int(value), command


def main(arguments: list[str]) -> int:
    try:
        restarts, command = split_restarts(arguments)
    except ValueError as error:
        print(f"supervise.py: {error}", file=sys.stderr)
        return MISTAKE
    return Supervisor(command, restarts).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
