"""A rank that dies or hangs must not leave the others waiting: each rank has a thread that watches all of them.

Every rank tells a store (its own connection to the one that the process group meets in) what it does and since when. A rank of this machine
whose process has gone, one that has not told anything for `watchdog_seconds`, or no progress anywhere for as long, ends all ranks: each
prints the stack of its main thread (and of the one that reads ahead), the lowest one a report that names the rank and its phase, and the
exit code is LOST.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import psutil
from torch import distributed as dist

from posttrain.common import terminal
from posttrain.parallel.rendezvous import INTERFACES

PHASES = ("connect", "data", "forward", "backward", "step", "eval", "save")  # the first, then in the order of a step
AHEAD = "next micro-batch"  # name of the thread, of posttrain/training/step.py, that builds it
LOST = 75  # exit code: nothing is wrong with the run itself, the same command goes on (EX_TEMPFAIL of sysexits.h)
UNTIMED = ("start", "export", "end")  # phases that may take any time: loading, compiling, writing the result


class Watchdog:
    """What this rank does, and what it knows of the others."""

    def __init__(self, seconds: float, rank: int, world_size: int):
        """Starts watching. `seconds`: without a sign of life or progress; 0 = only what has died."""
        self.seconds, self.rank, self.world_size = seconds, rank, world_size
        self.step, self.phase, self.count, self.since = 0, "start", 0, time.monotonic()
        self.main_thread = threading.get_ident()
        self.told: dict[int, dict] = {}  # last words of each rank
        self.heard: dict[int, float] = {}  # when they last changed
        self.talked = time.monotonic()  # when the store last answered
        self.lost: dict[int, str] = {}  # ranks that end the run, and how that shows
        self.over = threading.Event()
        self.tick = min(max(seconds / 10, 0.2), 5.0) if seconds else 1.0
        self.place = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "machine": _machine()}
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=seconds or 60)
        self.store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        self._tell()
        self.store.wait([f"posttrain/{rank}" for rank in range(world_size)])
        self._listen()  # one that fails at once is known by then
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say what this rank does now; also that it still makes progress in the same phase."""
        self.phase, self.since = phase, time.monotonic()
        self.step = self.step if step is None else step
        self.count += 1

    def close(self) -> None:
        """The work is done: other ranks may now leave before this one."""
        self.enter("end")
        self.over.set()
        self._tell()

    def explain(self, wait: float = 3.0) -> str | None:
        """Who is gone, once an operation with the others has failed; None where all seem to live. Waits for the news to arrive.

        Only the lowest rank that lives has more to say than its name.
        """
        self.over.set()
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            if gone := self._gone():
                return self._report(gone) if self._speaks_for(gone) else f"rank {self.rank} stops, too"
            time.sleep(0.1)
        return None

    def _talk(self) -> None:
        """Tell the store and listen to it. A thread of its own: where the process that keeps the store is stopped, this waits for ever."""
        while not self.over.wait(self.tick):
            try:
                self._tell()
                self._listen()
            except dist.DistError:  # the store has gone with rank 0, which _gone sees
                return
            self.talked = time.monotonic()

    def _tell(self) -> None:
        words = {
            "step": self.step,
            "phase": self.phase,
            "count": self.count,
            "beat": time.time(),
            "log": terminal.noise_path(),
            **self.place,
        }
        self.store.set(f"posttrain/{self.rank}", json.dumps(words))
        if self.lost:
            self.store.set("posttrain/lost", json.dumps(self.lost))

    def _listen(self) -> None:
        """The last words of every rank, when they changed, and what another rank has found out already."""
        now = time.monotonic()
        if self.store.check(["posttrain/lost"]):
            self.lost = {int(rank): how for rank, how in json.loads(self.store.get("posttrain/lost")).items()}
        for rank in range(self.world_size):
            words, before = json.loads(self.store.get(f"posttrain/{rank}")), self.told.get(rank)
            if before is None or words["beat"] != before["beat"]:
                self.heard[rank] = now
            words["progress"] = now if before is None or words["count"] != before["count"] else before["progress"]
            self.told[rank] = words

    def _judge(self) -> None:
        """End this rank where something is wrong. Waits for nobody."""
        looked = time.monotonic()
        while not self.over.wait(self.tick):
            now = time.monotonic()
            if now - looked > self.tick + max(1.0, self.seconds / 4):  # this process was stopped itself, as by Ctrl-Z: listen anew
                self.talked, self.heard = now, dict.fromkeys(self.heard, now)
                self.told = {rank: words | {"progress": now} for rank, words in self.told.items()}
            looked = now
            self.lost = self.lost or self._gone() or self._stuck(now)
            if self.lost and not self.over.is_set():
                self._end()

    def _gone(self) -> dict[int, str]:
        """Ranks that have died or fallen silent, and how that shows. Where rank 0 is silent, which keeps the store, all seem to be."""
        found, now = {}, time.monotonic()
        for rank, words in list(self.told.items()):
            if rank == self.rank or words["phase"] == "end":
                continue
            state = _process_state(words) if words["machine"] == self.place["machine"] else "?"
            if state is None:
                found[rank] = "has died"
            elif self.seconds and (silent := now - self.heard[rank]) > self.seconds and (rank == 0 or now - self.talked < self.seconds):
                found[rank] = f"has not answered for {silent:.0f} s{' (its process is stopped)' if state == psutil.STATUS_STOPPED else ''}"
        return found

    def _stuck(self, now: float) -> dict[int, str]:
        """The ranks that the others wait for, where none has made progress for long: those that have come least far."""
        if not self.seconds or any(words["phase"] in UNTIMED or now - words["progress"] <= self.seconds for words in self.told.values()):
            return {}
        reached = {rank: (words["step"], PHASES.index(words["phase"])) for rank, words in self.told.items()}
        return {
            rank: f"has made no progress for {now - words['progress']:.0f} s"
            for rank, words in self.told.items()
            if reached[rank] == min(reached.values())
        }

    def _report(self, found: dict[int, str]) -> str:
        lines = []
        for rank, how in found.items():
            words = self.told[rank]
            lines.append(
                f"rank {rank} ({words['host']}, pid {words['pid']}) {how}, last seen in phase {words['phase']} of step {words['step']}"
                + (f", its log is {words['log']}" if words["log"] else "")
            )
        others = [f"rank {r} in {w['phase']} of step {w['step']}" for r, w in sorted(self.told.items()) if r not in found]
        return (
            f"error: {'; '.join(lines)}. The run cannot go on without it and stops"
            + (f" (others: {', '.join(others)})" if others else "")
            + (f". {INTERFACES}" if any(self.told[rank]["phase"] == "connect" for rank in found) else "")
            + ". The same command goes on from the newest checkpoint"
        )

    def _speaks_for(self, lost: dict[int, str]) -> bool:
        """Whether this is the lowest rank that is left."""
        return self.rank == min((rank for rank in self.told if rank not in lost), default=self.rank)

    def _end(self) -> None:
        """Print, and leave. Called by the thread: the main one may be stuck for ever."""
        frames, names = sys._current_frames(), {thread.ident: thread.name for thread in threading.enumerate()}
        shown = [self.main_thread, *(ident for ident, name in names.items() if name.startswith(AHEAD))]  # the one may wait for the other
        stack = "".join(line for ident in shown for line in traceback.format_stack(frames[ident]))
        here = f"rank {self.rank} was in phase {self.phase} of step {self.step} for {time.monotonic() - self.since:.0f} s:\n{stack}"
        terminal.say_error(f"{self._report(self.lost)}\n{here}" if self._speaks_for(self.lost) else here)
        time.sleep(3 * self.tick)  # the others hear of it before this rank, which may keep the store, has gone
        for rank in set(self.lost) - {self.rank}:
            self._kill(self.told[rank])
        os._exit(LOST)

    def _kill(self, words: dict) -> None:
        """A stopped process of this machine would stay for ever: only SIGKILL ends it."""
        if words["machine"] == self.place["machine"] and _process_state(words):
            psutil.Process(words["pid"]).kill()


_active: Watchdog | None = None  # a process is one rank


def start(seconds: float, rank: int, world_size: int) -> None:
    """Watch, and be watched, from here on, where there is anyone else. After the ranks have met."""
    global _active
    if _active:
        _active.over.set()
    _active = Watchdog(seconds, rank, world_size) if world_size > 1 else None


def enter(phase: str, step: int | None = None) -> None:
    """Say what this rank does now; also that it still makes progress in the same phase."""
    if _active:
        _active.enter(phase, step)


def close() -> None:
    """The work is done."""
    if _active:
        _active.close()


def fall_silent() -> None:
    """This rank ends for a reason of its own: that others, which end alike, are gone is no news."""
    if _active:
        _active.over.set()


def explain() -> str | None:
    """Who is gone, once something has failed; None where all seem to live, or nobody is watched."""
    return _active.explain() if _active else None


def _machine() -> str:
    """Where a process id means something: this boot of this machine, in this container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _process_state(words: dict) -> str | None:
    """The state of a process of this machine; None where it has died."""
    try:
        process = psutil.Process(words["pid"])
        state = process.status()
        return state if _born(words["pid"]) == words["born"] and state != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


def _born(pid: int) -> int:
    """When a process began, in clock ticks since the machine did: psutil's time moves with the clock on the wall."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
