"""Good clients beside bad ones, and memory over many requests, for benchmarks/serve.py --soak.

posttrain/serve.py serves the quickstart's base model, and beside it a stranger's whose chat template loops; it may open 1,024 files. Good
clients ask for 8 tokens of the base model, chats and texts in turn, RATE times a second whether or not the ones before are done. They do
so for PHASE seconds alone, then beside each kind of bad client, and alone again. Bad clients (bad_clients.py) are a process of their own
at the lowest priority (nice 19), so that not their work is measured, but the server's. Server and good clients have a high one (nice -10)
where the system allows it, so that what else the machine does is measured less. The 99th percentile beside one kind is compared with that
of the phases alone before and after it.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
from bad_clients import CHAT, KINDS, TEXT, head
from server_process import CLIENTS, MODEL, PROMPTS, ROOT, ask, log_of, running
from side_by_side import RESULTS, as_text, machine, versions

RATE, PHASE, TOKENS, MOST_FILES, PRIORITY = 8, 20.0, 8, 1024, -10
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"


def stranger(folder: Path) -> Path:
    """Copy the model into FOLDER/stranger, with a template that loops where the first message says BOOM."""
    template = Path(shutil.copytree(MODEL, folder / "stranger")) / "chat_template.jinja"
    usual = template.read_text(encoding="utf-8")
    template.write_text("{% if 'BOOM' in messages[0]['content'] %}" + LOOP + "{% endif %}" + usual, encoding="utf-8")
    return template.parent


async def good(port: int, number: int) -> tuple[float, float] | None:
    """Ask for one streamed answer; return the seconds to its first token and to its end, or None where it is refused or cut."""
    prompt, began, first = f"{PROMPTS[number % len(PROMPTS)]} {number}", time.perf_counter(), None
    path, asked = (TEXT, {"prompt": prompt}) if number % 2 else (CHAT, {"messages": [{"role": "user", "content": prompt}]})
    body = json.dumps({"model": "base", "stream": True, "max_tokens": TOKENS, "temperature": 0, **asked}).encode()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head(len(body), path) + body)
            if b" 200 " not in await reader.readline():
                return None
            done = False
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    first = first or time.perf_counter() - began
                    done = done or line.startswith(b"data: [DONE]")
        finally:
            writer.transport.abort()
    except OSError:
        return None
    return (first, time.perf_counter() - began) if done else None


async def phase(port: int, seconds: float) -> list[tuple[float, float] | None]:
    """Return what good clients saw for so many seconds, at a fixed rate."""
    began, asked = time.perf_counter(), []
    for number in range(int(RATE * seconds)):
        await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
        asked.append(asyncio.ensure_future(good(port, number)))
    return await asyncio.gather(*asked)


def percentiles(seen: list[tuple[float, float] | None]) -> dict:
    """Return median and 99th percentile in ms of first token and whole answer, and how many had none."""
    answered = [one for one in seen if one]
    result: dict = {"requests": len(seen), "unanswered": len(seen) - len(answered)}
    for name, times in zip(("first_token_ms", "whole_ms"), zip(*answered, strict=True), strict=True):
        times = sorted(times)
        result[name] = [round(1000 * times[int(share * (len(times) - 1) + 0.5)], 1) for share in (0.5, 0.99)]
    return result


def at_rest(port: int, process: psutil.Process) -> dict:
    """Wait until no request is left, at most 60 seconds, and return the server's state."""
    began = time.perf_counter()
    while True:
        answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
        if not any(answer.json()["models"].values()) or time.perf_counter() - began > 60:
            break
        time.sleep(0.1)
    state = {"health": answer.status_code, "models": answer.json()["models"], "seconds_to_rest": round(time.perf_counter() - began, 1)}
    return state | {"files": process.num_fds(), "memory_mb": round(process.memory_info().rss / 2**20)}


async def beside(kind: str, port: int, seconds: float) -> tuple[list, dict]:
    """Return what good clients saw beside this kind of bad ones, and how often these got which status."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bad_clients.py"), kind, str(port), str(seconds + 4)]
    bad = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    await asyncio.sleep(2)  # until it is at work
    seen = await phase(port, seconds)
    return seen, json.loads((await bad.communicate())[0])


def neighbours(port: int, process: psutil.Process, kinds: list[str], seconds: float) -> dict:
    """Measure good clients beside each kind of bad ones, and alone before and after."""
    asyncio.run(phase(port, 5))  # warms up
    results, before = {}, asyncio.run(phase(port, seconds))
    for kind in kinds:
        seen, statuses = asyncio.run(beside(kind, port, seconds))
        state = at_rest(port, process)
        after = asyncio.run(phase(port, seconds))
        alone, crowded = percentiles(before + after), percentiles(seen)
        times = {f"{name}_p99_times": round(crowded[f"{name}_ms"][1] / alone[f"{name}_ms"][1], 2) for name in ("first_token", "whole")}
        results[kind] = {"what": KINDS[kind].__doc__, "alone": alone, "beside": crowded, **times, "they_got": statuses, "afterwards": state}
        print(kind, json.dumps(results[kind]["alone"]), json.dumps(crowded), times, statuses, state, flush=True)
        before = after
    return results


async def memory(port: int, count: int, process: psutil.Process) -> dict:
    """Memory in MB after every tenth of so many requests of eight tokens, CLIENTS at a time.

    Every prompt is new, so the first 10,000 also fill the cache that the tokenizers library keeps of texts (1.3 kB each).
    """
    seen, left = [], iter(range(count))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def work() -> None:
            for number in left:
                await ask(client, "base", f"{PROMPTS[number % len(PROMPTS)]} {number}", 8)
                if (number + 1) % max(count // 10, 1) == 0:
                    seen.append(round(process.memory_info().rss / 2**20, 1))

        began = time.perf_counter()
        await asyncio.gather(*[work() for _ in range(CLIENTS)])
    return {"requests": count, "seconds": round(time.perf_counter() - began, 1), "memory_mb": seen}


def soak(port: int, kinds: list[str], seconds: float, requests: int) -> dict:
    """Run the whole soak and return its figures."""
    with tempfile.TemporaryDirectory(prefix="posttrain_soak_") as folder:
        models = ["--checkpoint", f"base={MODEL}", "--checkpoint", str(stranger(Path(folder)))]
        command = [sys.executable, str(ROOT / "posttrain" / "serve.py"), *models, "--port", str(port), "--timeout", "60"]
        with running(command, port, MOST_FILES) as process:
            results = {"machine": machine(), "versions": versions(), "how": " ".join(__doc__.split("\n\n")[1].split())}
            results |= {"priority": os.nice(0), "rate": RATE, "seconds": seconds, "neighbours": neighbours(port, process, kinds, seconds)}
            results["memory"] = asyncio.run(memory(port, requests, process))
            results["log_bytes"] = log_of(port).stat().st_size
    return results


def main(options) -> None:
    """Run the soak and write its figures to results/soak.json, unless only some kinds are asked for."""
    with contextlib.suppress(PermissionError):
        os.nice(PRIORITY)
    results = soak(options.port, options.kinds or list(KINDS), options.seconds, options.requests)
    if not options.kinds:
        (RESULTS / "soak.json").write_text(as_text(results), encoding="utf-8")
    print(json.dumps(results["memory"]), results["log_bytes"])
