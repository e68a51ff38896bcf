"""What the terminal shows: a live progress line, log lines above it, and libraries' own output kept away from both, in a file.

If the output is not a terminal there is no live line, and the log lines also give the time left.
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

from posttrain.common.visible import visible

SHOWN_ON_FAILURE = 20  # last lines of libraries' output that are shown with an error
BAR = 12, 40  # least and greatest width of the progress bar, in columns
RECENT = 20  # the time left is estimated from the mean duration of so many last steps


class _Noise(NamedTuple):
    """The file that receives libraries' output."""

    file: BinaryIO
    begin: int  # offset in bytes at which this process's output begins
    path: Path | None = None

    def take(self) -> None:
        """Redirect the process's standard output and error to the file, for C code as well."""
        os.dup2(self.file.fileno(), 1)
        os.dup2(self.file.fileno(), 2)

    def read(self) -> bytes:
        """Returns what this process has printed to the file so far."""
        size = os.fstat(self.file.fileno()).st_size
        return os.pread(self.file.fileno(), size - self.begin, self.begin)


class _Terminal(Console):
    """A console that falls silent once the terminal is gone (closed pipe, lost connection): the run goes on, its files hold everything."""

    def print(self, *objects, **settings) -> None:
        try:
            super().print(*objects, **settings)
        except OSError:  # a lost terminal gives EIO
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def show_cursor(self, show: bool = True) -> bool:
        """Never hide the cursor, although rich would beside a live line: a process that is killed could not show it again."""
        return False


console = _Terminal(highlight=False, soft_wrap=True)
_errors: int | None = None  # file descriptor for errors, once libraries' output is redirected
_noise: _Noise | None = None
_live: Live | None = None


def keep_noise() -> None:
    """Redirect all other output of this process, C code's too, to a temporary file; `say` and `say_error` still reach the terminal."""
    global _errors, _noise
    sys.stdout.flush()
    console.file = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace")
    _errors, _noise = os.dup(2), _Noise(tempfile.TemporaryFile("w+b"), 0)  # noqa: SIM115 - stays open for the life of the process
    _noise.take()
    for stream in (sys.stdout, sys.stderr):
        # keeps the output of Python and of C code in order
        stream.reconfigure(line_buffering=True)  # ty: ignore[missing-union-attribute]
    faulthandler.enable(_errors)


def keep_noise_in(path: Path) -> None:
    """Append libraries' output, what was kept so far and what follows, to the file `path`. Does nothing before `keep_noise`."""
    global _noise
    if _noise is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    before, file = _noise.read(), path.open("a+b", buffering=0)
    _noise = _Noise(file, file.tell(), path)
    file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n".encode(errors="backslashreplace") + before)
    _noise.take()


def noise_path() -> str | None:
    """Returns the path of the file given to `keep_noise_in`; None before that."""
    return str(_noise.path) if _noise and _noise.path else None


def say(text: str) -> None:
    """Print a line to the terminal, above the live line if there is one."""
    console.print(visible(text), markup=False)


def say_error(text: str) -> None:
    """Write to the error stream in one piece, from any thread; does nothing if the stream is gone."""
    clear = "\r\x1b[2K" if _live else ""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno() if _errors is None else _errors, f"{clear}{visible(text)}\n".encode())


def show_noise() -> None:
    """Print the last lines that libraries have printed in this process: they may tell why it failed."""
    if _noise is None:
        return
    sys.stdout.flush()
    lines = [line.rpartition("\r")[2] for line in _noise.read().decode(errors="replace").splitlines()]
    last = [line for line in lines if line.strip() and not line.startswith("--- ")][-SHOWN_ON_FAILURE:]
    if last:
        where = f", from {_noise.path}" if _noise.path else ""
        say_error("\n".join([f"what libraries printed last{where}:", *(f"    {line}" for line in last)]))


class Steps:
    """Progress of a run: a log line every `interval` steps, and on a terminal a live line below them."""

    def __init__(self, first: int, total: int, interval: int):
        self.done, self.total, self.interval = first - 1, total, interval
        self.seconds: list[float] = []
        self.shown: list[str] = []

    def start(self) -> None:
        """Show the live line, if the output is a terminal."""
        global _live
        if console.is_terminal and not console.quiet:
            _live = Live(console=console, get_renderable=lambda: self, refresh_per_second=4, transient=True, redirect_stdout=False)
            _live.start()

    def step(self, step: int, seconds: float, parts: list[str]) -> None:
        """Note that `step` is done, and print its line when one is due. `parts`: texts such as "loss 1.2345", the most important first."""
        self.done, self.shown = step, parts
        self.seconds = [*self.seconds[1 - RECENT :], seconds]
        if step % self.interval and step != self.total:
            return
        line = [f"step {step}/{self.total}", *parts]
        say(" | ".join(line if _live else [*line, f"{self.left} left"]))

    @property
    def left(self) -> str:
        """The time left, as H:MM:SS or M:SS, estimated from the last steps; "?" before the first."""
        if not self.seconds:
            return "?"
        return duration((self.total - self.done) * sum(self.seconds) / len(self.seconds))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the live line: as many parts as the width holds, and a bar in the rest. With a log line at every step, no parts."""
        width, least = options.max_width - 3, BAR[0]  # leaves room for the ^C that Ctrl-C echoes
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
    """Remove the live line from the terminal."""
    global _live
    if _live:
        _live.stop()
        _live = None


def duration(seconds: float) -> str:
    """Formats seconds as M:SS, from an hour on as H:MM:SS."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
