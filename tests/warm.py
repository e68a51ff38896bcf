"""Starts ranks and scripts without waiting for Python to import: they are forked from a process that has imported everything already.

A launch of two ranks under `deepspeed` spends some ten seconds a process on imports. Here one process a test session, the warm one
(warm_server.py), imports torch, deepspeed, transformers and all of posttrain, and forks what a test starts. The ranks are real: engines,
process groups, arguments, environment, exit codes and output are those of DeepSpeed's launcher. What they lack are the launcher itself
and an interpreter of their own, so tests about those use the real command (conftest.launch_with_deepspeed and launch_command).

The warm process ends with the process that owns it, also where that one is killed, and serves only the code that it has imported: a
request from another copy of the repository, or after a file has changed, is an error.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWNER = "POSTTRAIN_WARM"  # environment variable, PID:FOLDER: the process that the warm one ends with, and where its socket is
PATIENCE = 240  # seconds for the imports
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def own() -> None:
    """Make this process, and what it starts, share a warm process of its own; it is started by the first who needs it."""
    os.environ[OWNER] = f"{os.getpid()}:{tempfile.gettempdir()}/posttrain_warm_{os.getpid()}_{os.urandom(4).hex()}"


def is_there() -> bool:
    """Whether the warm process runs already: for one script alone it is not worth starting."""
    return OWNER in os.environ and (Path(os.environ[OWNER].partition(":")[2]) / "socket").exists()


class Started:
    """What `start` returns: one rank's process, or those of all."""

    def __init__(self, args: list[str], connection: socket.socket, said: dict, outputs: list):
        self.args, self.pids, self.returncode = args, said["pids"], None
        self.connection, self.outputs = connection, outputs

    def poll(self) -> int | None:
        """The exit code; None while a rank is there."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The first exit code that is not 0, if any, once all ranks have ended; a signal's is negative. May raise TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            answer = self.connection.recv(1 << 16)
            self.returncode = json.loads(answer)["code"] if answer else -signal.SIGKILL
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal all ranks that are there."""
        if self.poll() is None:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def output(self) -> str:
        """What was printed so far, to both streams unless they were separated."""
        return self._read(0)

    @property
    def errors(self) -> str:
        """What was printed to the error stream, where it is a stream of its own."""
        return self._read(1)

    def _read(self, place: int) -> str:
        size = os.fstat(self.outputs[place].fileno()).st_size
        return os.pread(self.outputs[place].fileno(), size, 0).decode()


def start(script: str, *arguments: str, ranks: int | None = None, port: int = 0, env=None, cwd=None, outputs=()) -> Started:
    """Run a script of the repository; it goes with the object that this returns.

    `ranks`: so many processes with the environment that DeepSpeed's launcher gives them, which meet at `port`; None for one alone,
    as `python` starts it. `outputs`: files for what is printed, (both,) or (output, errors); by default one that `output` reads.
    """
    outputs = outputs or [tempfile.TemporaryFile()]  # noqa: SIM115 - it stays open as long as the object
    request = {"root": str(ROOT), "script": str(ROOT / script), "arguments": [str(argument) for argument in arguments], "ranks": ranks}
    request |= {"port": port, "env": dict(os.environ | ON_CPU if env is None else env), "cwd": str(cwd or Path.cwd())}
    connection = _connection()
    files = [outputs[0].fileno(), outputs[-1].fileno()]
    socket.send_fds(connection, [json.dumps(request).encode()], files)
    said = json.loads(connection.recv(1 << 16) or '{"error": "the warm process has gone"}')
    if "error" in said:
        raise RuntimeError(said["error"])
    return Started(["python", request["script"], *request["arguments"]], connection, said, outputs)


def run(script: str, *arguments: str, timeout: float = 300, separate: bool = False, **how) -> subprocess.CompletedProcess:
    """Run a script as `start` does, to its end; `separate` output and errors, or both in stdout. Raises subprocess.TimeoutExpired."""
    outputs = [tempfile.TemporaryFile() for _ in range(1 + separate)]  # noqa: SIM115 - closed with the object
    started = start(script, *arguments, outputs=outputs, **how)
    try:
        started.wait(timeout)
    except subprocess.TimeoutExpired as error:
        error.output = started.output
        raise
    finally:
        started.connection.close()  # ends what is left
    return subprocess.CompletedProcess(started.args, started.returncode, started.output, started.errors if separate else None)


def _connection() -> socket.socket:
    """To the warm process, which is started where there is none yet."""
    if OWNER not in os.environ:
        own()
    owner, _, name = os.environ[OWNER].partition(":")
    folder = Path(name)
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of the same session may be starting it
        if connection := _connect(folder):
            return connection
        if (folder / "log").exists():
            raise RuntimeError(f"the warm process has ended: {(folder / 'log').read_text()}")
        environment = os.environ | ON_CPU | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a thread of pyarrow's
        command = [sys.executable, "-u", str(ROOT / "tests" / "warm_server.py"), name, owner]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + PATIENCE
        while not (connection := _connect(folder)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the warm process did not start: {(folder / 'log').read_text()}")
            time.sleep(0.05)
    return connection


def _connect(folder: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(folder / "socket"))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection
