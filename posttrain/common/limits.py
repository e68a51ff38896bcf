"""Ends Python code of somebody else's that runs too long or takes too much memory, such as a chat template with a loop in a loop."""

import contextlib
import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterator

EVERY = 0.1  # seconds between looks at the clock


class TookTooLong(RuntimeError):
    """Raised inside code that was given too little time; its text says how much that was."""

    def __str__(self) -> str:
        return "it takes too long"


class _Watch:
    """Knows until when each thread may run limited code; a thread of its own ends what runs longer."""

    def __init__(self):
        self.lock, self.ends = threading.Lock(), {}
        self.thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self.lock:
            self.ends[threading.get_ident()] = time.monotonic() + seconds
            if self.thread is None:
                self.thread = threading.Thread(target=self._look, name="time limits", daemon=True)
                self.thread.start()

    def end(self) -> None:
        thread = threading.get_ident()
        with self.lock:
            if self.ends.pop(thread, None) is None:  # its time was over: an exception that has not come yet must not come later
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def _look(self) -> None:
        while True:
            time.sleep(EVERY)
            with self.lock:
                now = time.monotonic()
                for thread in [thread for thread, ends in self.ends.items() if ends < now]:
                    del self.ends[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))


_watch = _Watch()


def bound_memory(more: int) -> tuple[int, int]:
    """Let this process take at most `more` bytes of addresses beyond what it has; returns the limits, soft and hard, from before."""
    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + more
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    return before


class _Ceiling:
    """Bounds the process's address space as long as a thread runs limited code: the first one sets the bound, the last one lifts it."""

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def begin(self, more: int) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = bound_memory(more)

    def end(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                resource.setrlimit(resource.RLIMIT_AS, self.before)


_ceiling = _Ceiling()


def _forget_other_threads() -> None:
    """Begin anew in a forked process, in which only the thread that forked goes on."""
    global _watch, _ceiling
    if _ceiling.inside:
        resource.setrlimit(resource.RLIMIT_AS, _ceiling.before)
    _watch, _ceiling = _Watch(), _Ceiling()


os.register_at_fork(after_in_child=_forget_other_threads)


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Raise MemoryError inside the block where the process would take over `more` bytes of addresses more than it has at its beginning.

    Other threads are bounded, too, as long as the block runs: leave them enough.
    """
    ceiling = _ceiling
    ceiling.begin(more)
    try:
        yield
    finally:
        ceiling.end()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong inside the block once it has run for `seconds`, between two steps of Python code; not nested.

    A single operation of a library, such as a search by a regular expression, is not ended, but the block is after it.
    """
    watch = _watch
    watch.begin(seconds)
    try:
        yield
    finally:
        watch.end()
