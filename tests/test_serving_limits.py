"""Nobody ends the server, or slows it for others; benchmarks/serve.py --soak measures by how much."""

import asyncio
import contextlib
import errno
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import psutil
import pytest
import torch
from conftest import ROOT, rank_environment
from served import request, served, wait_for, wait_until_idle
from starlette.requests import Request
from test_strangers import LOOP
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.common import terminal
from posttrain.data.tokenization import load_tokenizer
from posttrain.model import assistant
from posttrain.operators.positions import context_of
from posttrain.serving import batching, connections, lines, reading
from posttrain.serving.answers import Model
from posttrain.serving.app import Endpoints, Limits
from posttrain.serving.batching import Batcher, EngineFailed
from posttrain.serving.reading import Reader, Unreadable
from posttrain.serving.sampling import Sampling, choose
from posttrain.serving.server import listen
from posttrain.serving.votes import Votes

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def stranger(tiny, tmp_path_factory):
    """A model whose template loops where the first message says BOOM, and that reads many tokens."""
    folder = tmp_path_factory.mktemp("strange") / "stranger"
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny.tokenizer), max_position_embeddings=100_000, eos_token_id=None, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = load_tokenizer(tiny.base)
    tokenizer.chat_template = "{% if 'BOOM' in messages[0]['content'] %}" + LOOP + "{% endif %}" + tiny.chat.jinja
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(stranger, tiny, tmp_path_factory):
    """A server of the stranger and of a good model."""
    log = tmp_path_factory.mktemp("limits") / "log"
    with served(log, "--checkpoint", stranger, "--checkpoint", f"good={tiny.base}") as running:
        yield running


def send(server, text: str, **more) -> socket.socket:
    """Send a chat request to the stranger and read nothing of its answer."""
    body = json.dumps({"model": "stranger", "messages": [{"role": "user", "content": text}], **more}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    client.sendall(head.encode() + body)
    return client


def active(server) -> int:
    """Return how many requests the stranger has."""
    return json.loads(server.health()[1])["models"]["stranger"]


# ---- connections ----


@contextlib.contextmanager
def listening(seen=lambda path: None, body: bool = False):
    """A server of one page, on a port of its own, in a thread.

    `seen` is called with the path of each request, and returns the seconds that its answer takes; whether its `body` is read.
    """

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await asyncio.sleep(seen(scope["path"]) or 0)
        while body and (await receive()).get("more_body", False):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    with listen("127.0.0.1", 0, 60) as listener:
        server = connections.Server(connections.configured(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


def answered(client: socket.socket) -> bool:
    """Send a request, and read its answer to the end."""
    client.sendall(HEAD + b"\r\n")
    answer = b""
    while not answer.endswith(b"ok"):
        answer += client.recv(4096)
    return b"200 OK" in answer


def test_a_head_that_does_not_end_is_cut_off(monkeypatch):
    """At once or after requests that were answered; a client that only waits between its requests is not."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with listening() as port:
        silent, half, patient = (socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(3))
        half.sendall(HEAD)
        for _ in range(3):
            assert answered(patient)
            time.sleep(0.7)
        patient.sendall(HEAD)
        for one in (silent, half, patient):
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(4096) == b""
            one.close()


def test_beyond_the_most_connections_the_one_that_kept_waiting_longest_is_cut(monkeypatch):
    """Also where that has sent the head of its request, or part of its body; whoever sends a request is answered."""
    monkeypatch.setattr(connections, "most_connections", lambda: 4)
    with listening() as port, contextlib.ExitStack() as clients:
        connect = partial(socket.create_connection, ("127.0.0.1", port), timeout=5)
        bad = [clients.enter_context(connect()) for _ in range(4)]
        for one, sent in zip(bad, (b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\nhalf", HEAD), strict=True):
            one.sendall(sent)
        time.sleep(0.2)
        for one in bad:
            assert answered(clients.enter_context(connect()))
            with contextlib.suppress(ConnectionResetError):
                while one.recv(4096):
                    pass


def order_of(senders: list[int], slow: int) -> list[str]:
    """Return the paths /0, /1, ... in the order in which they are taken, all being answered.

    Request number N comes from connection senders[N]; those after `slow` come at once, while the loop is at that one.
    """
    order, all_are_sent = [], threading.Event()

    def seen(path: str) -> None:
        order.append(path)
        assert path != f"/{slow}" or all_are_sent.wait(60)

    with listening(seen) as port, contextlib.ExitStack() as clients:
        there = [clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(max(senders) + 1)]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as last:  # once it is answered, the loop has all of them
            assert all(answered(last) for _ in range(4))  # every fourth turn is another's
        order.clear()
        for number, sender in enumerate(senders):
            there[sender].sendall(f"GET /{number} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            while number <= slow and len(order) <= number:
                time.sleep(0.01)
        all_are_sent.set()
        for number, one in enumerate(there):
            answer = b""
            while answer.count(b"\r\n\r\nok") < senders.count(number):
                answer += one.recv(4096)
    return order


def test_of_requests_at_once_the_last_is_taken_first():
    """While the loop is at the first one the others come; one after another is then taken, all are answered."""
    assert order_of(list(range(7)), slow=0) == ["/0", "/1", *(f"/{number}" for number in range(6, 1, -1))]


def test_those_that_had_many_turns_lately_come_after_the_others(monkeypatch):
    """Of two clients at once the one that goes on sending would else be the last again and again, and the other would have no turn."""
    monkeypatch.setattr(connections, "LATELY", 60.0)
    assert order_of([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0], slow=4) == [f"/{number}" for number in (0, 1, 2, 3, 4, 5, 9, 10, 8, 7, 6)]
    assert order_of([0, 0, 0, 1, 2, 3, 4, 5, 6, 0], slow=3) == [
        f"/{number}" for number in (0, 1, 2, 3, 4, 9, 8, 7, 6, 5)
    ]  # as many as usual


def test_before_a_turn_of_one_that_had_many_the_loop_rests_for_long_and_another_ends_the_rest(monkeypatch):
    monkeypatch.setattr(connections, "LONGEST_REST", 1.0)
    monkeypatch.setattr(connections, "LONG_REST", 1e6)
    monkeypatch.setattr(connections, "LATELY", 60.0)
    taken = []
    with listening(lambda path: taken.append(time.perf_counter())) as port, contextlib.ExitStack() as clients:
        frequent = clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        frequent.sendall((HEAD + b"\r\n") * (connections.FEW + 3))
        while len(taken) <= connections.FEW:
            time.sleep(0.01)
        assert answered(clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)))
        while len(taken) < connections.FEW + 4:
            time.sleep(0.01)
    until_other, *rests = (later - earlier for earlier, later in itertools.pairwise(taken[connections.FEW :]))
    assert until_other < 0.5 and rests[0] > 0.9 - until_other and rests[1] > 0.9, (until_other, rests)


def test_no_turn_takes_more_than_a_few_lines(monkeypatch):
    """A line of a head, or a chunk of a body, takes a thousand times as long as a byte: heads and chunks one after another, and both."""
    plain, taken = connections.Connection._take, []
    monkeypatch.setattr(connections.Connection, "_take", lambda self, data: (taken.append(data), plain(self, data))[1])
    chunks = b"1\r\na\r\n" * 3000
    post, most = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", connections.PIECE_LINES
    whole, text = post + chunks + b"0\r\n\r\n", post + b"9c40\r\n%s\r\n0\r\n\r\n" % (b"x\n" * 20_000)
    with listening(body=True) as port:
        for sent, answers, lines in ((whole, 1, most), (HEAD + b"\r\n", 300, 3), (whole, 2, most), (text, 1, 8 * most)):
            taken.clear()
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(sent * answers)
                answer = b""
                while answer.count(b"200 OK") < answers or not answer.endswith(b"ok"):
                    answer += client.recv(4096)
            assert b"".join(taken) == sent * answers
            assert max(data.count(b"\n") for data in taken) == lines


def test_what_follows_a_whole_request_waits_for_its_answer_and_is_bounded_as_any_head():
    """The head that comes with another request, or while that is answered, was not counted."""
    second = HEAD + b"a: b\r\n" * 3900 + b"\r\n"
    with listening(lambda path: 0.3) as port:
        for wait in (0.0, 0.1):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                client.sendall(HEAD + b"\r\n" + (second if not wait else b""))
                time.sleep(wait)
                with contextlib.suppress(ConnectionError):
                    client.sendall(second if wait else b"")
                answer = b""
                with contextlib.suppress(ConnectionError):
                    while more := client.recv(4096):
                        answer += more
            assert answer.startswith(b"HTTP/1.1 200 OK") and answer.count(b"HTTP/1.1") == 2
            assert b"HTTP/1.1 431" in answer


def test_a_head_that_is_too_long_is_refused():
    """Whether it comes at once or in pieces, and whether of many bytes or many lines; the body that comes with a head does not count."""
    head, most = HEAD + b"Content-Length: 60000\r\nx: ", connections.MOST_HEAD
    lines = b"\r\ny: z" * connections.MOST_LINES
    with listening() as port:
        for value, body, status in (
            (b"x" * (most // 2), b"\n" * 60_000, b"200"),
            (b"x" * most, b"", b"431"),
            (lines, b"", b"431"),
            (b"x" * 10**6, b"", b"431"),
        ):
            for step in (100_000, 1000):
                sent = head + value + b"\r\n\r\n" + body
                with socket.create_connection(("127.0.0.1", port), timeout=5) as client, contextlib.suppress(ConnectionError):
                    for at in range(0, len(sent), step):
                        client.sendall(sent[at : at + step])
                    assert client.recv(12) == b"HTTP/1.1 " + status


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux only")
def test_half_requests_from_a_thousand_connections_leave_room_for_others(server):
    """Those that it cannot hold are cut without a word: asyncio's own way is to accept more, and to log a traceback for each."""
    before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (400, before[1]))
    try:
        with contextlib.ExitStack() as clients:
            for number in range(1000):
                half = clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                with contextlib.suppress(ConnectionError):
                    half.sendall(HEAD)
                if number % 200 == 199:
                    body = json.dumps({"model": "good", "prompt": "pa", "max_tokens": 3})
                    assert request(server, "POST", "/v1/completions", body)[0] == 200
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)
    assert "Traceback" not in server.log.read_text()


UNREAD = {  # requests whose answer does not depend on their body, with the status
    "an unknown path": (b"POST /v1/nope", b"Content-Length: 1000000", 404),
    "another method": (b"PUT /v1/models", b"Content-Length: 1000000", 405),
    "a path that is another": (b"POST /v1/completions/", b"Content-Length: 1000000", 307),
    "a request that has none": (b"GET /health", b"Content-Length: 1000000", 200),
    "a body in chunks": (b"POST /v1/nope", b"Transfer-Encoding: chunked", 404),
    "a client that asks first": (b"POST /v1/nope", b"Content-Length: 1000000\r\nExpect: 100-continue", 404),
}


@pytest.mark.parametrize("what", UNREAD)
def test_what_is_not_read_of_a_request_is_no_request(server, what):
    """What came of it after the answer was counted as the head of another, which got an answer, too: the next request's."""
    line, length, status = UNREAD[what]
    body = b"x\n" * 500_000
    if b"chunked" in length:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(line + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + length + b"\r\n\r\n")
        time.sleep(0.1)
        client.sendall(body)
        answer = b""
        while more := client.recv(4096):
            answer += more
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:100]
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer.lower()


# ---- reading ----


def kill(reader: Reader) -> None:
    """End the process of a reader, as the system does where memory is short."""
    os.kill(reader.process, signal.SIGKILL)
    wait_for(lambda: psutil.Process(reader.process).status() == psutil.STATUS_ZOMBIE, 20)


def test_a_reader_that_was_ended_from_outside_fails_no_request():
    reader = Reader(len)
    try:
        kill(reader)
        assert asyncio.run(reader.read("four")) == 4
    finally:
        reader.stop()


def test_a_reader_that_cannot_be_started_is_started_later_and_no_other_process_is_ended(monkeypatch):
    """Without memory, say, or beyond a limit of processes."""
    ended, plain, fork = [], os.kill, os.fork

    def full() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    reader = Reader(len)
    try:
        first = reader.process
        kill(reader)
        monkeypatch.setattr(os, "kill", lambda *given: (ended.append(given), plain(*given)))
        monkeypatch.setattr(os, "fork", full)
        for _ in range(3):
            with pytest.raises(reading.NoReader, match="Resource temporarily unavailable"):
                asyncio.run(reader.read("four"))
        monkeypatch.setattr(os, "fork", fork)
        assert asyncio.run(reader.read("four")) == 4
        assert not ended and reader.process != first
    finally:
        reader.stop()


def test_a_reader_that_stands_still_is_ended_in_time_whatever_it_is_given(monkeypatch):
    """A short text fits into the pipe; of a long one a part waits to be taken."""
    monkeypatch.setattr(reading, "READ_SECONDS", 1.0)
    reader = Reader(len)
    try:
        for text in ("four", "x" * 10**6):
            os.kill(reader.process, signal.SIGSTOP)
            with pytest.raises(Unreadable, match="took longer than 1 s"):
                asyncio.run(reader.read(text))
            assert asyncio.run(reader.read(text)) == len(text)
    finally:
        reader.stop()


def test_a_result_that_cannot_be_sent_back_ends_no_reader():
    def nested(depth: int) -> list:
        return [] if not depth else [nested(depth - 1)]

    reader = Reader(nested)
    try:
        before = reader.process
        with pytest.raises(Unreadable, match="it cannot be read"):
            asyncio.run(reader.read(900))
        assert asyncio.run(reader.read(2)) == [[[]]]
        assert reader.process == before
    finally:
        reader.stop()


@pytest.mark.slow
def test_a_template_that_loops_delays_its_own_model_only(server):
    looping = [send(server, "BOOM") for _ in range(8)]
    wait_for(lambda: active(server) == 8, 20)
    for body in ({"prompt": "pa"}, {"messages": [{"role": "user", "content": "pa"}]}):
        path = "/v1/completions" if "prompt" in body else CHAT
        assert request(server, "POST", path, json.dumps({"model": "good", "max_tokens": 3, **body}))[0] == 200
    assert active(server) >= 6  # the good ones did not wait for them
    assert server.health()[0] == 200  # each ends by itself; a start anew would only give strangers the power to cause it
    for one in looping[1:]:
        one.close()
    assert looping[0].recv(12) == b"HTTP/1.1 400"
    wait_until_idle(server)


def test_work_that_does_not_end_is_ended_and_the_next_is_done(monkeypatch):
    monkeypatch.setattr(reading, "READ_SECONDS", 1.0)

    def work(what: str) -> str:
        while what == "loop":
            pass
        if what == "die":
            os._exit(1)
        return what if what == "ok" else str(bytes(2**40))

    reader = Reader(work)
    try:
        for what, says in (("loop", "took longer than 1 s"), ("die", "ended the process"), ("memory", "cannot be read .*MemoryError")):
            with pytest.raises(Unreadable, match=says):
                asyncio.run(reader.read(what))
            assert asyncio.run(reader.read("ok")) == "ok"
    finally:
        reader.stop()


# ---- the end, and health ----


def test_lines_that_nobody_reads_stop_nothing_and_are_counted(monkeypatch):
    """A terminal that Ctrl+S stopped, or a pipe to a pager."""
    shown, goes_on = [], threading.Event()
    monkeypatch.setattr(terminal, "say", lambda line: goes_on.wait() and shown.append(line))
    monkeypatch.setattr(lines, "MOST", 10)
    made = lines.Lines()
    for number in range(50):
        made.say(str(number))
    goes_on.set()
    wait_for(lambda: len(shown) >= 10, 20)
    made.handle(logging.LogRecord("uvicorn.error", logging.ERROR, "x.py", 1, "it %s", ("fails",), None))
    made.end()
    first = shown.index(next(line for line in shown if "could" in line))
    assert shown[:first] == [str(number) for number in range(first)]
    assert shown[first:] == [f"{50 - first} lines could not be printed: nobody read them", "it fails"]


@pytest.mark.skipif(shutil.which("unshare") is None or os.getuid() != 0, reason="needs root, and unshare")
def test_the_first_process_of_a_container_heeds_a_signal(tmp_path):
    """The kernel gives it none that it has no handler for, so `docker stop` waited ten seconds."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, time\nfrom posttrain.parallel.script import run_script\n"
        "run_script(lambda: (print('number', os.getpid(), flush=True), time.sleep(60)))\n"
    )
    command = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=rank_environment() | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout.readline() == "number 1\n"
        inside = psutil.Process(process.pid).children()[0]
        inside.terminate()
        assert process.wait(timeout=20) == 143


@pytest.mark.slow
def test_a_signal_ends_the_server_and_all_its_processes_whatever_hangs(stranger, tmp_path):
    """A template loops, a client reads nothing, two answers are long, half requests are open."""
    with served(tmp_path / "log", "--checkpoint", stranger) as server, contextlib.ExitStack() as clients:
        for _ in range(50):
            half = clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            half.sendall(b"POST / HTTP/1.1\r\n")
        clients.enter_context(send(server, "pa", max_tokens=90_000, temperature=0))
        stream = clients.enter_context(send(server, "pa", stream=True, max_tokens=90_000, temperature=0))
        assert stream.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"  # both are being generated
        clients.enter_context(send(server, "BOOM"))
        wait_for(lambda: active(server) == 3, 20)
        readers = psutil.Process(server.pid).children(recursive=True)
        assert len(readers) == 3
        server.process.terminate()
        server.process.wait(timeout=10)
        wait_for(lambda: not any(reader.is_running() for reader in readers), 5)


@pytest.fixture
def endpoints(tiny, tmp_path):
    batcher = Batcher(assistant.load(str(tiny.base), dtype=torch.float32), 4)
    batcher.start()
    made = Endpoints({"base": Model(batcher.assistant, batcher)}, Limits(4, 4, 60, 10**6), Votes(tmp_path / "votes"), print)
    yield made
    for reader in (made.bodies, *made.prompts.values()):
        reader.stop()
    batcher.stop()


def health(endpoints: Endpoints) -> tuple[int, dict]:
    """Return status and problems."""
    response = asyncio.run(endpoints.health(Request({"type": "http"})))
    return response.status_code, json.loads(response.body).get("problems", {})


def answer(batcher: Batcher) -> list[int]:
    """Return the ids of a short answer."""

    async def ask() -> list[int]:
        return [token async for tokens in batcher.generate([5, 6, 7], Sampling(3, 0.0), 20) for token in tokens]

    return asyncio.run(ask())


def test_health_is_bad_while_generation_hangs_and_good_afterwards(endpoints, monkeypatch):
    batcher, goes_on = endpoints.models["base"].batcher, threading.Event()
    said = answer(batcher)
    assert health(endpoints) == (200, {})
    monkeypatch.setattr(batching, "HANG_SECONDS", 1.0)
    monkeypatch.setattr(batching, "choose", lambda *given: goes_on.wait() and choose(*given))
    try:
        with pytest.raises(EngineFailed, match="hangs"):
            answer(batcher)
        status, problems = health(endpoints)
    finally:
        goes_on.set()
    assert status == 503
    assert "generation hangs: its last step began" in problems["base"]
    wait_for(lambda: health(endpoints) == (200, {}), 20)
    assert answer(batcher) == said


def test_health_is_bad_once_generation_has_ended(endpoints):
    batcher = endpoints.models["base"].batcher

    def broken(*_) -> None:
        raise RuntimeError("the device is lost")

    batcher.manager._generation_step = broken
    with pytest.raises(EngineFailed):
        answer(batcher)
    wait_for(lambda: batcher.failure is not None, 20)
    status, problems = health(endpoints)
    assert status == 503
    assert "generation has ended: the device is lost" in problems["base"]


# ---- memory ----


@pytest.mark.parametrize(("positions", "reads"), [(256, 256), (8192, 8192), (131_072, 131_072), (10**9, 240_000)])
def test_the_cache_of_a_small_model_is_small_however_many_tokens_it_claims_to_read(tiny, positions, reads):
    loaded = assistant.load(str(tiny.base), dtype=torch.float32)
    loaded.model.config.max_position_embeddings = positions
    batcher = Batcher(loaded._replace(context=positions), 32)
    blocks = batcher.manager.continuous_batching_config.num_blocks
    assert 0.9 * reads <= min(positions, (blocks - 1) * batching.PAGE) <= reads
    of_token = 4 * (2 * 2 * 2 * 8 + batching.CPU_BATCH_TOKENS)  # keys and values, and a column of the attention mask
    assert blocks * batching.PAGE * of_token <= batching.SMALL_CACHE


@pytest.mark.parametrize("positions", [0, -5])
def test_a_model_that_reads_nothing_is_refused(tiny, positions):
    config = assistant.load(str(tiny.base)).model.config
    config.max_position_embeddings = positions
    with pytest.raises(ValueError, match=f"max_position_embeddings {positions}; expected"):
        context_of(config)
