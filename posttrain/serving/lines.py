"""Prints the server's lines in a thread: a terminal that was stopped, or a pipe that nobody reads, would stop the server."""

import logging
import queue
import threading

from posttrain.common import terminal

MOST = 1000  # lines that wait to be printed; what comes beyond is counted
LAST_SECONDS = 1.0  # that the last lines have at the end


class Lines(logging.Handler):
    """Prints lines, and what is logged, in their order."""

    def __init__(self):
        super().__init__()
        self.waiting: queue.Queue[str | None] = queue.Queue(MOST)
        self.left_out = 0
        self.thread = threading.Thread(target=self._print, name="lines", daemon=True)
        self.thread.start()

    def say(self, line: str) -> None:
        """Print a line soon."""
        try:
            if self.left_out:
                self.waiting.put_nowait(f"{self.left_out:,} lines could not be printed: nobody read them")
                self.left_out = 0
            self.waiting.put_nowait(line)
        except queue.Full:
            self.left_out += 1

    def emit(self, record: logging.LogRecord) -> None:
        """Print what a library has logged."""
        self.say(self.format(record))

    def end(self) -> None:
        """Print what is left, for a moment."""
        try:
            self.waiting.put(None, timeout=LAST_SECONDS)
        except queue.Full:
            return
        self.thread.join(LAST_SECONDS)

    def _print(self) -> None:
        while (line := self.waiting.get()) is not None:
            terminal.say(line)
