"""Ends the run when a rank dies or hangs, so that the others do not wait for it: threads on each rank watch all of them.

Every rank publishes its step and phase in the store in which the ranks met, over a connection of its own. The run ends if the process of a
rank on the same machine is gone, if a rank has published nothing for `watchdog_seconds`, or if no rank has made progress for as long. Then
each rank prints the stack of its main thread (and of the one that reads ahead), the lowest one left also a message that names the lost
rank and its phase, and all exit with code LOST.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil
from torch import distributed as dist

from posttrain.common import terminal
from posttrain.parallel.launched import Launch
from posttrain.parallel.rendezvous import INTERFACES, machine_id, open_store

PHASES = ("connect", "data", "forward", "backward", "step", "eval", "save")  # "connect" comes first, the others in the order of a step
AHEAD = "next micro-batch"  # name of the thread of posttrain/training/state.py that builds it
LOST = 75  # exit code: nothing is wrong with the run itself, the same command continues it (EX_TEMPFAIL of sysexits.h)
UNTIMED = ("start", "export", "end")  # phases that may take any time: loading, compiling, writing the result


class Watchdog:
    """Publishes what this rank is doing, and watches the others."""

    def __init__(self, seconds: float, launch: Launch):
        """Start watching. `seconds`: how long a rank may be silent or make no progress; 0 to notice only processes that have died."""
        self.seconds, self.rank, self.world_size = seconds, launch.rank, launch.world_size
        self.step, self.phase, self.count, self.since = 0, "start", 0, time.monotonic()
        self.main_thread = threading.get_ident()
        self.told: dict[int, dict] = {}  # what each rank published last
        self.heard: dict[int, float] = {}  # when that last changed
        self.talked = time.monotonic()  # when the store last answered
        self.lost: dict[int, str] = {}  # ranks because of which the run ends -> what was noticed of them
        self.over = threading.Event()
        self.tick = min(max(seconds / 10, 0.2), 5.0) if seconds else 1.0
        self.place = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "machine": machine_id()}
        self.store = open_store(launch, seconds or 60)
        self._publish()
        self.store.wait([f"posttrain/{rank}" for rank in range(self.world_size)])
        self._read()  # so a rank that fails at once is already known
        for work in (self._exchange, self._watch):
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Note that this rank enters `phase`, or makes progress in the phase that it is in."""
        self.phase, self.since = phase, time.monotonic()
        self.step = self.step if step is None else step
        self.count += 1

    def close(self) -> None:
        """Stop watching, as the work is done: other ranks may now exit before this one."""
        self.enter("end")
        self.over.set()
        self._publish()

    def explain(self, wait: float = 3.0) -> str | None:
        """Returns a message that names the ranks that are gone, after a collective has failed; None if none is gone within `wait` seconds.

        Only on the lowest surviving rank does the message have details.
        """
        self.over.set()
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            if gone := self._lost_ranks():
                return self._message(gone) if self._is_lowest_survivor(gone) else f"rank {self.rank} stops, too"
            time.sleep(0.1)
        return None

    def _exchange(self) -> None:
        """Publish and read, again and again, in a thread of its own: it waits for ever if the process that holds the store is suspended."""
        while not self.over.wait(self.tick):
            try:
                self._publish()
                self._read()
            except dist.DistError:  # the store is gone with rank 0, which _lost_ranks notices
                return
            self.talked = time.monotonic()

    def _publish(self) -> None:
        """Write this rank's state, and the lost ranks that it knows of, to the store."""
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

    def _read(self) -> None:
        """Read from the store every rank's state, noting when it changed, and the lost ranks that another rank has noticed."""
        now = time.monotonic()
        if self.store.check(["posttrain/lost"]):
            self.lost = {int(rank): how for rank, how in json.loads(self.store.get("posttrain/lost")).items()}
        for rank in range(self.world_size):
            words, before = json.loads(self.store.get(f"posttrain/{rank}")), self.told.get(rank)
            if before is None or words["beat"] != before["beat"]:
                self.heard[rank] = now
            words["progress"] = now if before is None or words["count"] != before["count"] else before["progress"]
            self.told[rank] = words

    def _watch(self) -> None:
        """End this rank once a rank is lost, in a thread of its own that never waits for another rank or the store."""
        looked = time.monotonic()
        while not self.over.wait(self.tick):
            now = time.monotonic()
            if now - looked > self.tick + max(1.0, self.seconds / 4):  # this process itself was suspended, as by Ctrl-Z: start afresh
                self.talked, self.heard = now, dict.fromkeys(self.heard, now)
                self.told = {rank: words | {"progress": now} for rank, words in self.told.items()}
            looked = now
            self.lost = self.lost or self._lost_ranks() or self._stalled_ranks(now)
            if self.lost and not self.over.is_set():
                self._exit()

    def _lost_ranks(self) -> dict[int, str]:
        """Returns the ranks that have died or fallen silent, with what shows it; only rank 0 if it, which holds the store, is silent."""
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

    def _stalled_ranks(self, now: float) -> dict[int, str]:
        """Returns the ranks that the others wait for, if no rank has made progress for `seconds`: those that have come least far."""
        if not self.seconds or any(words["phase"] in UNTIMED or now - words["progress"] <= self.seconds for words in self.told.values()):
            return {}
        reached = {rank: (words["step"], PHASES.index(words["phase"])) for rank, words in self.told.items()}
        return {
            rank: f"has made no progress for {now - words['progress']:.0f} s"
            for rank, words in self.told.items()
            if reached[rank] == min(reached.values())
        }

    def _message(self, found: dict[int, str]) -> str:
        """Returns the error message that names the lost ranks, and where they and the others were."""
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
            + ". The same command continues from the newest checkpoint"
        )

    def _is_lowest_survivor(self, lost: dict[int, str]) -> bool:
        """Whether this rank is the lowest of those that are not lost, the one that prints details."""
        return self.rank == min((rank for rank in self.told if rank not in lost), default=self.rank)

    def _exit(self) -> None:
        """Print where this rank was, and exit. The watching thread calls it, as the main one may be stuck for ever."""
        frames, names = sys._current_frames(), {thread.ident: thread.name for thread in threading.enumerate()}
        # the main thread may be waiting for the one that reads ahead
        shown = [self.main_thread, *(ident for ident, name in names.items() if name.startswith(AHEAD))]
        stack = "".join(line for ident in shown for line in traceback.format_stack(frames[ident]))
        here = f"rank {self.rank} was in phase {self.phase} of step {self.step} for {time.monotonic() - self.since:.0f} s:\n{stack}"
        terminal.say_error(f"{self._message(self.lost)}\n{here}" if self._is_lowest_survivor(self.lost) else here)
        time.sleep(3 * self.tick)  # lets the others read of it before this rank, which may hold the store, is gone
        for rank in set(self.lost) - {self.rank}:
            self._kill(self.told[rank])
        os._exit(LOST)

    def _kill(self, words: dict) -> None:
        """Kill a lost rank's process if it is on this machine: a suspended one would stay for ever, and only SIGKILL ends it."""
        if words["machine"] == self.place["machine"] and _process_state(words):
            psutil.Process(words["pid"]).kill()


_active: Watchdog | None = None  # one per process, as a process is one rank


def start(seconds: float, launch: Launch) -> None:
    """Start this process's watchdog, unless it is the only rank. All ranks, after they have met."""
    global _active
    if _active:
        _active.over.set()
    _active = Watchdog(seconds, launch) if launch.world_size > 1 else None


def enter(phase: str, step: int | None = None) -> None:
    """Note that this rank enters `phase` (see PHASES, UNTIMED) of `step`, or makes progress in the phase that it is in."""
    if _active:
        _active.enter(phase, step)


def close() -> None:
    """Stop watching, as the work is done."""
    if _active:
        _active.close()


def fall_silent() -> None:
    """Stop watching because this rank ends by an error of its own: others that end likewise are not to be called lost."""
    if _active:
        _active.over.set()


def explain() -> str | None:
    """Returns a message that names the lost ranks, after a collective has failed; None if none is lost, or there is no watchdog."""
    return _active.explain() if _active else None


def _process_state(words: dict) -> str | None:
    """Returns psutil's status of a rank's process, which is on this machine; None if it has died."""
    try:
        process = psutil.Process(words["pid"])
        state = process.status()
        return state if _born(words["pid"]) == words["born"] and state != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


def _born(pid: int) -> int:
    """Returns when a process began, in clock ticks since boot: unlike psutil's time it does not move when the clock is set."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
