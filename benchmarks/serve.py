"""The server under load, beside transformers' own: python benchmarks/serve.py [--soak 20000]

The quickstart's base model (1.9 million parameters) is served by posttrain/serve.py and by `transformers serve --continuous-batching`, both
in float32 on the CPU, in alternation. This process asks them over HTTP: one client, then 32 at once, greedy answers of at most 64 tokens,
streamed. Then posttrain's gets --soak short requests while its memory is watched. Written to benchmarks/results/serve.json.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from side_by_side import machine, summarise, versions

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "launch" / "quickstart" / "base"
CLIENTS, TOKENS, ROUNDS, ALONE = 32, 64, 3, 12
PROMPTS = [f"Tell about {name} {i}" for i in range(16) for name in ("Tanilo", "Bemimi", "Kato", "Ruvi")]


def commands(port: int) -> dict[str, tuple[list[str], str]]:
    """The command that starts each server, and the name under which it serves the model."""
    ours = [sys.executable, str(ROOT / "posttrain" / "serve.py"), "--checkpoint", f"base={MODEL}", "--port", str(port)]
    transformers = Path(sys.executable).with_name("transformers")
    theirs = [str(transformers), "serve", str(MODEL), "--continuous-batching", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    theirs += ["--cb-num-blocks", "512", "--cb-max-batch-tokens", "512"]  # its own choice is 60 % of the machine's memory
    return {"posttrain": (ours, "base"), "transformers serve": (theirs, str(MODEL))}


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[psutil.Process]:
    """Run a server for the duration of the context; yields its process once it answers."""
    log = Path("/tmp") / f"serve_{port}.log"
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}) as one,
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


async def measure(port: int, model: str) -> dict:
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits) as client:
        await asyncio.gather(*[ask(client, model, prompt, TOKENS) for prompt in PROMPTS[:CLIENTS]])  # warms up
        began = time.perf_counter()
        alone = [await ask(client, model, prompt, TOKENS) for prompt in PROMPTS[:ALONE]]
        one = sum(answer["pieces"] for answer in alone) / (time.perf_counter() - began)
        began = time.perf_counter()
        together = await asyncio.gather(*[ask(client, model, prompt, TOKENS) for prompt in PROMPTS])
        many = sum(answer["pieces"] for answer in together) / (time.perf_counter() - began)
    gaps = sorted(gap for answer in alone for gap in answer["gaps"])
    return {
        "first_token_ms": 1000 * statistics.median(answer["first"] for answer in alone),
        "gap_ms": 1000 * statistics.median(gaps),
        "gap_ms_95": 1000 * gaps[int(0.95 * len(gaps))],
        "one_client": one,
        "many_clients": many,
        "first_token_ms_of_many": 1000 * statistics.median(answer["first"] for answer in together),
        "texts": [answer["text"] for answer in alone],
    }


async def soak(port: int, model: str, count: int, process: psutil.Process) -> dict:
    """Memory in MB after every tenth of so many requests of eight tokens, CLIENTS at a time.

    Every prompt is new, so the first 10,000 also fill the cache that the tokenizers library keeps of texts (1.3 kB each).
    """
    memory, left = [], iter(range(count))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def work() -> None:
            for number in left:
                await ask(client, model, f"{PROMPTS[number % len(PROMPTS)]} {number}", 8)
                if (number + 1) % (count // 10) == 0:
                    memory.append(round(process.memory_info().rss / 2**20, 1))

        began = time.perf_counter()
        await asyncio.gather(*[work() for _ in range(CLIENTS)])
    return {"requests": count, "seconds": time.perf_counter() - began, "memory_mb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soak", type=int, default=20_000)
    parser.add_argument("--port", type=int, default=18_200)
    options = parser.parse_args()
    results: dict = {"machine": machine(), "versions": versions(), "clients": CLIENTS, "runs": {}}
    for number in range(ROUNDS):
        for name, (command, model) in commands(options.port + number).items():
            with running(command, options.port + number):
                run = asyncio.run(measure(options.port + number, model))
            texts = run.pop("texts")
            results["runs"].setdefault(name, []).append(run)
            print(name, {key: round(value, 2) for key, value in run.items()}, repr(texts[0][:40]), flush=True)
    ours, theirs = (results["runs"][name] for name in commands(0))
    results["throughput_of_32_against_one"] = statistics.median(run["many_clients"] / run["one_client"] for run in ours)
    results["faster_than_transformers"] = {key: summarise(ours, theirs, key) for key in ("one_client", "many_clients")}
    command, model = commands(options.port + 9)["posttrain"]
    with running(command, options.port + 9) as process:
        results["soak"] = asyncio.run(soak(options.port + 9, model, options.soak, process))
    path = ROOT / "benchmarks" / "results" / "serve.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()
