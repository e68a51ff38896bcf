"""What the terminal shows: on a real one (a pty that pyte reads as a terminal does), and where the output is a file."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import BinaryIO

import pyte
import pytest
import warm
from conftest import ROOT, launch_command, rank_environment, start
from rich.console import Console
from test_runs import sft_arguments

from posttrain.common import terminal

ENVIRONMENT = rank_environment() | {"TERM": "xterm-256color"}
PARTS = ["loss 1.2345", "margin 0.123", "accuracy 0.75", "lr 2.00e-05", "312 ms", "52,341 tokens/s", "71.2 GB"]


def shown(width: int, interval: int = 10, done: int = 37) -> str:
    steps = terminal.Steps(1, 200, interval)
    steps.done, steps.shown, steps.seconds = done, PARTS, [0.5] * 20
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(steps)
    return captured.get().rstrip("\n")


def test_the_live_line_holds_what_fits():
    assert shown(200) == f"{'━' * 40}  37/200  18%  1:22 left  " + "  ".join(PARTS)
    assert shown(80).endswith("37/200  18%  1:22 left  loss 1.2345  margin 0.123  lr 2.00e-05")
    for width in range(10, 220):
        assert len(shown(width)) < max(width, 12), width
        assert "\n" not in shown(width)
    assert "loss" not in shown(200, interval=1)  # the line above it has it


def test_the_bar_goes_from_nothing_to_all():
    for done in (0, 100, 200):
        steps = terminal.Steps(1, 200, 10)
        steps.done = done
        console = Console(width=100, force_terminal=True, color_system="standard", legacy_windows=False)
        with console.capture() as captured:
            console.print(steps)
        green = captured.get().partition("\x1b[32m")[2].partition("\x1b[0m")[0]
        assert green == "━" * (40 * done // 200)


class Session:
    """A terminal of so many columns, and the process that prints to it."""

    def __init__(self, columns: int, start: Callable[[BinaryIO], subprocess.Popen | warm.Started]):
        """`start` is given the terminal's file, and returns what runs there."""
        self.screen = pyte.HistoryScreen(columns, 60, history=1000)
        self.stream, self.raw = pyte.ByteStream(self.screen), b""
        self.terminal, other = pty.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
        with os.fdopen(other, "wb", buffering=0) as file:
            self.process = start(file)

    def read_until(self, wanted: bytes | None, seconds: float = 200) -> None:
        """None: to the end of the command."""
        deadline = time.monotonic() + seconds
        while wanted is None or wanted not in self.raw:
            assert time.monotonic() < deadline, self.raw.decode(errors="replace")[-3000:]
            if select.select([self.terminal], [], [], 1)[0]:
                try:
                    read = os.read(self.terminal, 65536)
                except OSError:  # the command has gone
                    read = b""
                if not read:
                    assert wanted is None, self.raw.decode(errors="replace")[-3000:]
                    return
                self.raw += read
                self.stream.feed(read)

    @property
    def lines(self) -> list[str]:
        """All that can be read on it at last, scrolled away or not."""
        above = ["".join(line[x].data for x in range(self.screen.columns)).rstrip() for line in self.screen.history.top]
        return [line for line in [*above, *(line.rstrip() for line in self.screen.display)] if line]


@pytest.mark.slow
def test_a_run_on_a_terminal_leaves_lines_and_no_bar(tiny, tmp_path):
    arguments = [*sft_arguments(tiny, tmp_path / "run"), "--log_interval=2"]
    session = Session(80, lambda file: start("posttrain/sft.py", *arguments, env=ENVIRONMENT, outputs=[file]))
    session.read_until(None)
    assert session.process.wait(30) == 0, session.raw.decode()
    text = "\n".join(session.lines)
    assert "━".encode() in session.raw  # it was there
    assert "━" not in text
    assert [line.split()[1] for line in session.lines if line.startswith("step ")] == ["2/6", "4/6", "6/6"] or text.count("step ") > 3
    assert sum("eval at step" in line for line in session.lines) == 3
    assert f"saved {tmp_path}/run/final" in text.replace("\n", "")
    assert session.screen.cursor.x == 0


@pytest.mark.slow
def test_ctrl_c_leaves_a_clean_screen_and_a_saved_run(tiny, tmp_path):
    arguments = [*sft_arguments(tiny, tmp_path / "run", "--log_interval=1000"), "--eval_interval=0"]
    many = [argument for argument in arguments if not argument.startswith(("--max_iters", "--eval_interval"))]
    command = launch_command("posttrain/sft.py", *many, "--eval_interval=0", "--max_iters=100000", ranks=2)
    supervised = [sys.executable, str(ROOT / "launch" / "supervise.py"), *command]

    def begin(file: BinaryIO) -> subprocess.Popen:
        """As a shell does: in a session of its own, whose terminal this is."""
        streams = {"stdin": file, "stdout": file, "stderr": file, "env": ENVIRONMENT, "cwd": "/"}
        return subprocess.Popen(["setsid", "--ctty", "--wait", *supervised], **streams)

    session = Session(100, begin)
    session.read_until(b" ms")  # of the first step; with hours left there is no room for more
    os.write(session.terminal, b"\x03")
    session.read_until(None)
    assert session.process.wait(30) == 0, session.raw.decode()
    text = "\n".join(session.lines)
    assert "stopped after step" in text
    assert "━" not in text
    assert session.screen.cursor.x == 0
    assert not session.screen.cursor.hidden


def test_the_end_of_the_noise_is_shown_with_an_error(tmp_path):
    """In a process of its own: descriptors are redirected, those of C code too."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from posttrain.common import terminal\n"
        "terminal.keep_noise()\n"
        "print('a library speaks')\n"
        f"terminal.keep_noise_in(Path({str(tmp_path)!r}) / 'logs' / 'rank_0.log')\n"
        "os.write(2, b'so does C\\n')\n"
        "terminal.say('a line of ours')\n"
        "terminal.say_error('error: it broke')\n"
        "terminal.show_noise()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a line of ours\n"
    log = tmp_path / "logs" / "rank_0.log"
    assert done.stderr.splitlines() == [
        "error: it broke",
        f"what libraries printed last, from {log}:",
        "    a library speaks",
        "    so does C",
    ]
