"""The terminal: a live line per step, lines that do not break it, and a file for what libraries print.

Where the output is no terminal the live line is left out, and its numbers stand in the lines.
"""

import contextlib
import faulthandler
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

SHOWN_ON_FAILURE = 20  # lines of what libraries printed
BAR = 12, 40  # columns, at least and at most
RECENT = 20  # steps whose mean the time left goes by


class _Noise(NamedTuple):
    """A file that libraries print to."""

    file: BinaryIO
    begin: int  # where this process began to
    path: Path | None = None

    def take(self) -> None:
        os.dup2(self.file.fileno(), 1)
        os.dup2(self.file.fileno(), 2)

    def read(self) -> bytes:
        size = os.fstat(self.file.fileno()).st_size
        return os.pread(self.file.fileno(), size - self.begin, self.begin)


class _Terminal(Console):
    """Where the terminal has gone (a closed pipe, a lost connection) the run goes on without: the files hold everything."""

    def print(self, *objects, **settings) -> None:
        try:
            super().print(*objects, **settings)
        except OSError:  # a lost terminal gives EIO
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def show_cursor(self, show: bool = True) -> bool:
        """It stays, also beside a live line: a process that is killed could not show it again."""
        return False


console = _Terminal(highlight=False, soft_wrap=True)
_errors: int | None = None  # the descriptor that errors go to, once libraries print elsewhere
_noise: _Noise | None = None
_live: Live | None = None


def keep_noise() -> None:
    """From here on what libraries print is kept, Python's or not; what is said here still goes to the terminal."""
    global _errors, _noise
    sys.stdout.flush()
    console.file = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")
    _errors, _noise = os.dup(2), _Noise(tempfile.TemporaryFile("w+b"), 0)  # noqa: SIM115 - it stays open
    _noise.take()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # in the order in which it was said
    faulthandler.enable(_errors)


def keep_noise_in(path: Path) -> None:
    """What was kept so far, and what comes, goes to the end of a file."""
    global _noise
    if _noise is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    before, file = _noise.read(), path.open("a+b", buffering=0)
    _noise = _Noise(file, file.tell(), path)
    file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n".encode() + before)
    _noise.take()


def noise_path() -> str | None:
    """Of the file, once there is one."""
    return str(_noise.path) if _noise and _noise.path else None


def say(text: str) -> None:
    console.print(text, markup=False)


def say_error(text: str) -> None:
    """On the error stream, where it is still there, in one piece; from any thread."""
    clear = "\r\x1b[2K" if _live else ""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno() if _errors is None else _errors, f"{clear}{text}\n".encode())


def show_noise() -> None:
    """The end of what libraries printed since this process began, as an error may have its cause there."""
    if _noise is None:
        return
    sys.stdout.flush()
    lines = [line.rpartition("\r")[2] for line in _noise.read().decode(errors="replace").splitlines()]
    last = [line for line in lines if line.strip() and not line.startswith("--- ")][-SHOWN_ON_FAILURE:]
    if last:
        where = f", from {_noise.path}" if _noise.path else ""
        say_error("\n".join([f"what libraries printed last{where}:", *(f"    {line}" for line in last)]))


class Steps:
    """The run's steps: a line every `interval` of them, and on a terminal the live line below."""

    def __init__(self, first: int, total: int, interval: int):
        self.done, self.total, self.interval = first - 1, total, interval
        self.seconds: list[float] = []
        self.shown: list[str] = []

    def start(self) -> None:
        global _live
        if console.is_terminal and not console.quiet:
            _live = Live(console=console, get_renderable=lambda: self, refresh_per_second=4, transient=True, redirect_stdout=False)
            _live.start()

    def step(self, step: int, seconds: float, parts: list[str]) -> None:
        """`parts`: what is told of the step, the most important first."""
        self.done, self.shown = step, parts
        self.seconds = [*self.seconds[1 - RECENT :], seconds]
        if step % self.interval and step != self.total:
            return
        line = [f"step {step}/{self.total}", *parts]
        say(" | ".join(line if _live else [*line, f"{self.left} left"]))

    @property
    def left(self) -> str:
        """Time left, by the last steps."""
        if not self.seconds:
            return "?"
        return duration((self.total - self.done) * sum(self.seconds) / len(self.seconds))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many parts as the width holds, and a bar in what is left. Parts that the line above shows are left out."""
        width, least = options.max_width - 3, BAR[0]  # Ctrl-C echoes as ^C behind it
        parts = [f"{self.done}/{self.total}", f"{self.done / self.total:.0%}", f"{self.left} left"]
        for part in self.shown if self.interval > 1 else ():
            if least + 2 + len("  ".join([*parts, part])) <= width:
                parts.append(part)
        told = "  ".join(parts)
        room = min(BAR[1], width - len(told) - 2)
        full = round(room * self.done / self.total)
        bar = Text.assemble(("━" * full, "green"), ("━" * (room - full), "dim"), "  ") if room >= 4 else Text()
        yield Text.assemble(bar, told[:width], no_wrap=True)


def stop_live() -> None:
    """Take the live line away."""
    global _live
    if _live:
        _live.stop()
        _live = None


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
