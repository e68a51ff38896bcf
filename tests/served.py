"""A server for the tests: posttrain/serve.py in a process of its own, which is forked from the warm one if that is there."""

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import warm
from conftest import ROOT, free_port, rank_environment


@contextlib.contextmanager
def served(log: Path, *arguments: str, **environment: str) -> Iterator[SimpleNamespace]:
    """Start serve.py with these arguments, yield once it answers, and end it afterwards; `log` is a file for what it prints."""
    port = free_port()
    arguments = ("--port", port, *arguments)
    with log.open("w") as out:
        how = {"env": rank_environment() | environment, "cwd": log.parent}
        if warm.is_there():
            process = warm.start("posttrain/serve.py", *arguments, outputs=[out], **how)
        else:
            command = [sys.executable, str(ROOT / "posttrain" / "serve.py"), *map(str, arguments)]
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **how)
        try:
            server = SimpleNamespace(port=port, url=f"http://127.0.0.1:{port}", log=log, process=process, folder=log.parent)
            server.pid = process.pids[0] if isinstance(process, warm.Started) else process.pid
            server.health = lambda: request(server, "GET", "/health")
            wait_for(lambda: process.poll() is not None or _answers(server), 90)
            assert process.poll() is None, log.read_text()
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_for(condition, seconds: float) -> None:
    """Wait until the condition holds, at most so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def wait_until_idle(server) -> None:
    """Wait until no model of the server is at an answer: one that is given up ends at its next token, which a busy machine is late with."""
    wait_for(lambda: not any(json.loads(server.health()[1])["models"].values()), 20)


def request(server, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, bytes]:
    """Return status and body of a plain HTTP request; `_` in a header's name becomes `-`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    if body is not None:
        headers = {"content_type": "application/json"} | headers
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def _answers(server) -> bool:
    try:
        return server.health()[0] == 200
    except OSError:
        return False
