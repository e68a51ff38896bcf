"""A server as a process of its own, and a client that times its answers, for serve.py and soak.py."""

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "launch" / "quickstart" / "base"
CLIENTS = 32
PROMPTS = [f"Tell about {name} {i}" for i in range(16) for name in ("Tanilo", "Bemimi", "Kato", "Ruvi")]


def log_of(port: int) -> Path:
    """Return where what the server on a port prints is kept."""
    return Path(tempfile.gettempdir()) / f"serve_{port}.log"


@contextlib.contextmanager
def running(command: list[str], port: int, files: int | None = None) -> Iterator[psutil.Process]:
    """Run a server, which may open so many files, for the duration of the context; yields its process once it answers."""
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))} if files else {}
    log = log_of(port)
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **limits) as one,
    ):
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                if one.poll() is not None:
                    sys.exit(log.read_text(encoding="utf-8")[-2000:])
                time.sleep(0.1)
            yield psutil.Process(one.pid)
        finally:
            one.terminate()
            one.wait(30)


async def ask(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> dict:
    """First token and gaps in seconds, and how many tokens came."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": tokens, "stream": True}
    began, times, text = time.perf_counter(), [], ""
    async with client.stream("POST", "/v1/chat/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            choices = json.loads(line[6:])["choices"]
            if choices and (piece := choices[0]["delta"].get("content")):
                times.append(time.perf_counter() - began)
                text += piece
    return {"first": times[0], "gaps": [b - a for a, b in itertools.pairwise(times)], "text": text, "pieces": len(times)}
