"""Clients that mean harm to a server, for benchmarks/serve.py --soak: python benchmarks/bad_clients.py KIND PORT SECONDS

Each kind is a function that misbehaves towards the server on a port until it is cancelled. The server serves the models "base" and
"stranger", whose chat template loops where a message says BOOM. This process runs at the lowest priority and prints, as JSON, how often
each status came; "cut" counts connections without an answer.
"""

import asyncio
import collections
import contextlib
import itertools
import json
import os
import sys

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MILLION = 1_000_000  # characters of a long prompt, which are a little less than the longest request that is read
seen: collections.Counter[str] = collections.Counter()


def head(length: int, path: str = CHAT, more: str = "") -> bytes:
    """Return the head of a request with a body of so many bytes; `more` is further lines."""
    fixed = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
    return f"POST {path} HTTP/1.1\r\n{fixed}\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def question(text: str = "Tell about Kato", **more) -> bytes:
    """Return the body of a chat request."""
    return json.dumps({"model": "base", "messages": [{"role": "user", "content": text}], "max_tokens": 1, **more}).encode()


@contextlib.asynccontextmanager
async def connected(port: int):
    """Open a connection for the duration of the context, and count it as cut where the server ends it."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    except OSError:
        seen["cut"] += 1
        await asyncio.sleep(0.1)
        return
    try:
        yield reader, writer
    except (OSError, asyncio.IncompleteReadError):
        seen["cut"] += 1
    finally:
        writer.transport.abort()


async def ask(port: int, body: bytes, path: str = CHAT, more: str = "") -> None:
    """Send one whole request and read its answer to the end."""
    with contextlib.suppress(RuntimeError):  # of a context that yields nothing
        async with connected(port) as (reader, writer):
            writer.write(head(len(body), path, more) + body)
            status = await reader.readline()
            await reader.read(-1)
            seen[status.split(b" ")[1].decode() if b" " in status else "cut"] += 1


async def keep_on(one, count: int, every: float = 0.0) -> None:
    """Run so many of `one()` at once, each again and again, with `every` seconds of rest between two."""

    async def again(number: int) -> None:
        await asyncio.sleep(every * number / count)
        while True:
            await one()
            await asyncio.sleep(every)

    await asyncio.gather(*map(again, range(count)))


async def at_once(one, count: int, every: float) -> None:
    """Start so many of `one()` in the same instant, wait for all and `every` seconds, and start anew."""
    while True:
        await asyncio.gather(*(one() for _ in range(count)), asyncio.sleep(every))


async def half_heads(port: int) -> None:
    """1,500 connections send half a request's head and wait; cut ones come back after five seconds."""

    async def one() -> None:
        with contextlib.suppress(RuntimeError):
            async with connected(port) as (reader, writer):
                writer.write(head(10)[:40])
                await reader.read(1)
                seen["cut"] += 1

    await keep_on(one, 1500, 5.0)


async def slow_bodies(port: int) -> None:
    """200 connections send their body by one byte a second."""

    async def one() -> None:
        with contextlib.suppress(RuntimeError):
            async with connected(port) as (reader, writer):
                writer.write(head(1000))
                answer = asyncio.ensure_future(reader.readline())
                while not answer.done():
                    writer.write(b" ")
                    await asyncio.wait({answer}, timeout=1)
                seen[answer.result().split(b" ")[1].decode() if b" " in answer.result() else "cut"] += 1

    await keep_on(one, 200, 1.0)


async def one_long_word(port: int) -> None:
    """A prompt of one word of a million letters, one after another."""
    body = question("x" * MILLION)
    await keep_on(lambda: ask(port, body), 1, 0.2)


async def many_words(port: int) -> None:
    """A prompt of a quarter of a million words, one after another."""
    body = question("pa tu " * (MILLION // 6))
    await keep_on(lambda: ask(port, body), 1, 0.2)


async def long_prompts_at_once(port: int) -> None:
    """24 prompts of a million letters in the same instant, every five seconds."""
    body = question("x" * MILLION)
    await at_once(lambda: ask(port, body), 24, 5.0)


async def longest_read(port: int) -> None:
    """Texts to continue that are just short enough to be tokenised, eight at a time."""
    bodies = itertools.cycle(
        [json.dumps({"model": "base", "prompt": text, "max_tokens": 1}).encode() for text in ("x" * 8_000, "pa tu " * 1_300)]
    )
    await keep_on(lambda: ask(port, next(bodies), TEXT), 8, 0.4)


async def hostile_json(port: int) -> None:
    """Bodies of up to a megabyte: nested deeply, with huge numbers, NaN, half characters, 30,000 messages, 500,000 token ids."""
    number = b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "seed": %s}'
    messages = json.dumps({"model": "base", "messages": [{"role": "user", "content": "x"}] * 30_000}).encode()
    ids = json.dumps({"model": "base", "prompt": [1] * 300_000}).encode()
    bodies = [(b"[" * MILLION, CHAT), (b'{"a":' * (MILLION // 5), CHAT), (number % (b"9" * MILLION), CHAT), (number % b"1e999999", CHAT)]
    bodies += [(number % b"NaN", CHAT), (question("\ud800"), CHAT), (messages, CHAT), (ids, TEXT), (b"\xff" * MILLION, CHAT)]
    bodies += [(question(**{f"key{i}": 1 for i in range(50_000)}), CHAT)]
    turn = itertools.cycle(bodies)
    await keep_on(lambda: ask(port, *next(turn)), 2, 0.4)


async def unread_streams(port: int) -> None:
    """Streams of 64 tokens whose client reads nothing, one begun every second and left after five."""
    body = question(stream=True, max_tokens=64)

    async def one() -> None:
        with contextlib.suppress(RuntimeError):
            async with connected(port) as (_, writer):
                writer.transport.pause_reading()
                writer.write(head(len(body)) + body)
                await asyncio.sleep(5)
                seen["unread"] += 1

    await keep_on(one, 5)


async def leaving(port: int) -> None:
    """Clients that ask for 400 tokens and leave 50 ms later, four a second."""
    bodies = itertools.cycle([question(stream=stream, max_tokens=400) for stream in (True, False)])

    async def one() -> None:
        with contextlib.suppress(RuntimeError):
            async with connected(port) as (_, writer):
                body = next(bodies)
                writer.write(head(len(body)) + body)
                await asyncio.sleep(0.05)
                seen["left"] += 1

    await keep_on(one, 4, 0.95)


async def bursts(port: int) -> None:
    """400 requests of one token for the other model in the same instant, every ten seconds: 160 have a place, the others get 429."""
    body = question(model="stranger")
    await at_once(lambda: ask(port, body), 400, 10.0)


async def looping_template(port: int) -> None:
    """Eight chats at a time with a model whose template loops in a loop for this message."""
    body = question("BOOM", model="stranger")
    await keep_on(lambda: ask(port, body), 8)


async def limits(port: int) -> None:
    """Options at their limits and beyond them: n, best_of, max_tokens, logprobs, top_k, seeds, stop texts; 20 a second."""
    stops = ["".join(pair) * 128 for pair in itertools.product("abcd", repeat=2)]
    asked = [{"n": 128}, {"best_of": 20}, {"max_tokens": 10**9}, {"max_tokens": 10**30}, {"logprobs": True, "top_logprobs": 20}]
    asked += [{"top_k": 2**63, "top_p": 0.9}, {"top_k": 10**30}, {"seed": 2**64 - 1}, {"stop": stops}, {"stop": ["x"] * 10_000}]
    asked += [
        {"temperature": 2, "repetition_penalty": 10, "top_p": 1e-9},
        {"stop": "x" * 100_000},
        {"logit_bias": {str(i): 1 for i in range(999)}},
    ]
    bodies = itertools.cycle([question(**one) for one in asked])
    await keep_on(lambda: ask(port, next(bodies)), 4, 0.2)


async def strangers_at_the_door(port: int) -> None:
    """Foreign hosts and origins, unknown paths, models and keys, no JSON; 20 a second."""
    requests = [
        (b"{}", "/v1/" + "x" * 5000),
        (b"{}", "/page/../../etc/passwd"),
        (question(model="x" * 100_000), CHAT),
        (question(tools=[{}]), CHAT),
    ]
    requests += [
        (b"{}", CHAT, "Origin: http://evil.example\r\n"),
        (b"x=1", CHAT),
        (b"", CHAT),
        (b"{}", CHAT, "Authorization: Bearer wrong\r\n"),
    ]
    turn = itertools.cycle(requests)
    await keep_on(lambda: ask(port, *next(turn)), 4, 0.2)


async def big_heads(port: int) -> None:
    """Heads of 15,000, 60,000 and a million bytes, and of 2,500 lines; 20 a second."""
    lines = itertools.cycle(["a: b\r\n" * 2_500, f"a: {'b' * 15_000}\r\n", f"a: {'b' * 60_000}\r\n", f"a: {'b' * MILLION}\r\n"])
    await keep_on(lambda: ask(port, question(), CHAT, next(lines)), 4, 0.2)


async def endless(port: int, begin: bytes, more: bytes) -> None:
    """Send `begin` and then `more` without end, as fast as it is taken; and anew where the server hangs up."""

    async def one() -> None:
        with contextlib.suppress(RuntimeError):
            async with connected(port) as (_, writer):
                writer.write(begin)
                while True:
                    writer.write(more)
                    await writer.drain()

    await keep_on(one, 1, 0.1)


CHUNKED = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


async def small_chunks(port: int) -> None:
    """A body in chunks of one byte, as fast as they are taken."""
    await endless(port, CHUNKED, b"1\r\na\r\n" * 5000)


async def refused_bodies(port: int) -> None:
    """A body without end, as fast as it is taken, for a request that its head's content type refuses."""
    await endless(port, CHUNKED.replace(b"application/json", b"text/plain"), b"8000\r\n" + b"a" * 0x8000 + b"\r\n")


async def pipelined(port: int) -> None:
    """Requests in one stream, each sent before the one before it is answered, as fast as they are taken."""
    await endless(port, b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500)


KINDS = (half_heads, slow_bodies, one_long_word, many_words, long_prompts_at_once, longest_read, hostile_json, unread_streams, leaving)
KINDS = (*KINDS, bursts, looping_template, limits, strangers_at_the_door, big_heads, small_chunks, refused_bodies, pipelined)
KINDS = {kind.__name__: kind for kind in KINDS}


async def misbehave(kind: str, port: int, seconds: float) -> None:
    """Be this kind of client for so many seconds."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(KINDS[kind](port), seconds)


if __name__ == "__main__":
    os.setpriority(os.PRIO_PROCESS, 0, 19)  # its own work shall not be what is measured
    asyncio.run(misbehave(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
    print(json.dumps(seen))
