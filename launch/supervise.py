"""Runs a launcher's command so that a run can be stopped and is started again: python launch/supervise.py COMMAND [--max_restarts=N]

A signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP) goes to the ranks, which save and stop; the exit code is then 0. A second one ends them at
once. (DeepSpeed's launcher does not pass SIGTERM on, and its inner launcher ends one rank after another.) Where the command fails for
another reason than a mistake in it, it is started again up to N times and goes on from the newest checkpoint.
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

import psutil

MISTAKE = 2  # exit code of the scripts for what a restart would not mend
PAUSE = 3  # seconds before a restart
GRACE = 600  # seconds for ranks whose launcher has gone; they notice it, save, and stop by themselves
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Supervisor:
    """`reach`: hands a signal to ranks on other hosts, whose orderly end the command's exit code tells."""

    def __init__(self, command: list[str], max_restarts: int, reach: Callable[[int], None] | None = None):
        self.command, self.max_restarts, self.reach, self.asked = command, max_restarts, reach, 0
        self.child: subprocess.Popen | None = None

    def run(self) -> int:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._pass_on)
        self.well = (
            Path(tempfile.mkdtemp(prefix="posttrain_supervise_")) / "all_is_well"
        )  # made by a rank, see posttrain/parallel/stopping.py
        # a job's time limit counts from here
        environment = {"POSTTRAIN_STARTED": str(time.time())} | os.environ | {"POSTTRAIN_ALL_IS_WELL": str(self.well)}
        try:
            return self._run(environment)
        finally:
            shutil.rmtree(self.well.parent, ignore_errors=True)

    def _run(self, environment: dict[str, str]) -> int:
        for restart in range(self.max_restarts + 1):
            self.well.unlink(missing_ok=True)  # of the start before: ranks that outlived their launcher may have stopped in order
            # a session of its own: Ctrl-C in the terminal reaches the ranks once, through _pass_on
            self.child = subprocess.Popen(self.command, env=environment, start_new_session=True)
            if self.asked:  # while it was being started
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
        """The command's exit code. Where its launcher has gone before its ranks they get GRACE seconds to save and stop."""
        code, ranks = self.child.wait(), self._ranks()
        if ranks:
            deadline = time.monotonic() + GRACE
            while self._ranks() and time.monotonic() < deadline and self.asked < 2:
                time.sleep(0.2)
            code = code or 1
        self._end_what_is_left()
        return 0 if self.asked and self.well.exists() else code

    def _pass_on(self, number: int, frame) -> None:
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
        if not ranks and self.child.poll() is None:  # none has started yet: there is nothing to save
            os.killpg(self.child.pid, signal.SIGTERM)

    def _ranks(self) -> list[psutil.Process]:
        return [process for process in self._session() if any(part.startswith("--local_rank=") for part in _command_line(process))]

    def _session(self) -> list[psutil.Process]:
        """All processes that the command has started, orphans too."""
        return [process for process in psutil.process_iter() if _session_of(process.pid) == self.child.pid]

    def _end_what_is_left(self) -> None:
        for process in self._session():
            if process.pid != self.child.pid:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _command_line(process: psutil.Process) -> list[str]:
    """Of a rank: the launcher itself also names --local_rank, within one argument."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def split_restarts(arguments: list[str]) -> tuple[int, list[str]]:
    """The number of --max_restarts=NUMBER, and what else there is."""
    restarts = [argument for argument in arguments if argument.startswith("--max_restarts")]
    command = [argument for argument in arguments if argument not in restarts]
    value = restarts[-1].partition("=")[2] if restarts else "0"
    if not value.isdigit() or not command:
        raise ValueError(f"expected --max_restarts=NUMBER and a command, saw {' '.join(arguments)}")
    return int(value), command


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--help"]:
        print(__doc__)
        return 0
    try:
        restarts, command = split_restarts(arguments)
    except ValueError as error:
        print(f"supervise.py: {error}", file=sys.stderr)
        return MISTAKE
    return Supervisor(command, restarts).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
