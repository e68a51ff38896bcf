"""The server under load, beside transformers' own: python benchmarks/serve.py

The quickstart's base model (1.9 million parameters) is served by posttrain/serve.py and by `transformers serve --continuous-batching`, both
in float32 on the CPU, in alternation. This process asks them over HTTP: one client, then 32 at once, greedy answers of at most 64 tokens,
streamed. Written to benchmarks/results/serve.json.

With --soak, bad clients beside good ones instead, and memory over many requests, as soak.py says: benchmarks/results/soak.json.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import httpx
import soak
from server_process import CLIENTS, MODEL, PROMPTS, ROOT, ask, running
from side_by_side import machine, summarise, versions

TOKENS, ROUNDS, ALONE = 64, 3, 12


def commands(port: int) -> dict[str, tuple[list[str], str]]:
    """The command that starts each server, and the name under which it serves the model."""
    ours = [sys.executable, str(ROOT / "posttrain" / "serve.py"), "--checkpoint", f"base={MODEL}", "--port", str(port)]
    transformers = Path(sys.executable).with_name("transformers")
    theirs = [str(transformers), "serve", str(MODEL), "--continuous-batching", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    theirs += ["--cb-num-blocks", "512", "--cb-max-batch-tokens", "512"]  # its own choice is 60 % of the machine's memory
    return {"posttrain": (ours, "base"), "transformers serve": (theirs, str(MODEL))}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=18_200)
    parser.add_argument("--soak", action="store_true", help="measure bad clients beside good ones, and memory")
    parser.add_argument("--kinds", nargs="+", choices=soak.KINDS, metavar="KIND", help="kinds of bad clients (all); writes no file")
    parser.add_argument("--seconds", type=float, default=soak.PHASE, help="of each phase")
    parser.add_argument("--requests", type=int, default=10_000, help="while memory is watched")
    options = parser.parse_args()
    if options.soak:
        return soak.main(options)
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
    path = ROOT / "benchmarks" / "results" / "serve.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()
