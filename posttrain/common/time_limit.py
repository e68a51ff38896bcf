"""Ends Python code of somebody else's that runs too long, such as a chat template with a loop in a loop, in whichever thread it runs."""

import contextlib
import ctypes
import os
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


def _forget_other_threads() -> None:
    """Begin anew in a forked process, in which only the thread that forked goes on."""
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_forget_other_threads)


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
