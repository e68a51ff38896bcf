"""The server: OpenAI's endpoints over one or more checkpoints, and the page that talks to them."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from posttrain.data.chat import render_prompt
from posttrain.data.encoding import encode_text, text_prefix
from posttrain.data.parts import Refused
from posttrain.model.assistant import Assistant
from posttrain.serving.access import Walls, problem
from posttrain.serving.batching import Batcher, EngineFailed
from posttrain.serving.schema import Asked, ChatAsked, CompletionAsked, Vote
from posttrain.serving.text import TextStream
from posttrain.serving.vllm_batching import VLLMBatcher
from posttrain.serving.votes import Votes

PAGE = Path(__file__).parent / "page"
LAST_WORDS = 10.0  # seconds beyond the time limit, for a client to read what is said of it
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    # nothing that a model says can become script, and nothing is fetched from anywhere else
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Limits(NamedTuple):
    batch: int  # requests of a model that are generated at once
    queue: int  # requests of a model that may wait
    timeout: float  # seconds that a request may take
    body: int  # bytes


class Model(NamedTuple):
    assistant: Assistant
    batcher: Batcher | VLLMBatcher


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, content: dict, headers: dict | None = None):
        super().__init__(content["error"]["message"])
        self.status, self.content, self.headers = status, content, headers


class Piece(NamedTuple):
    """What has come of an answer since the last piece."""

    text: str
    tokens: int
    end: str | None = None  # finish_reason


def build(models: dict[str, Model], limits: Limits, votes: Votes, api_key: str | None, any_host: bool, say: Callable[[str], None]):
    """The ASGI application. `models` by the name that requests give; `say` gets a line for each request, without its text."""
    began = int(time.time())
    active = dict.fromkeys(models, 0)  # requests of each that are generated, or wait

    @contextlib.asynccontextmanager
    async def lifespan(_):
        try:
            yield
        finally:
            for model in models.values():
                await asyncio.to_thread(model.batcher.stop)

    app = FastAPI(title="posttrain", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(lambda _, error: JSONResponse(problem(str(error.detail)), error.status_code))
    app.exception_handler(Refusal)(lambda _, error: JSONResponse(error.content, error.status, error.headers))
    app.exception_handler(Exception)(lambda _, error: JSONResponse(problem("the server failed; its log says more", "server_error"), 500))

    def find(name: str) -> Model:
        if name not in models:
            raise Refusal(404, problem(f"there is no such model; there are: {', '.join(models)}", param="model", code="model_not_found"))
        return models[name]

    async def answer(http: Request, asked: Asked, model: Model, ids: list[int], form: "Form"):
        try:
            sampling, stops = asked.sampling(len(ids), model.assistant.context), asked.stops()
        except ValueError as error:
            raise Refusal(400, problem(str(error), code="context_length_exceeded" if "tokens" in str(error) else None)) from None
        name, batcher = model.assistant.name, model.batcher
        if batcher.problem:
            raise Refusal(503, problem(batcher.problem, "server_error"))
        if active[name] >= limits.batch + limits.queue:
            message = f"{active[name]} requests are running or waiting, which is the limit; try again later"
            raise Refusal(429, problem(message, "rate_limit_error", code="queue_full"), {"Retry-After": "1"})
        active[name] += 1  # before anything is awaited, so that no other request sees the place free

        def leave() -> None:
            active[name] -= 1

        pieces = _noted(_pieces(model, ids, sampling, stops, limits.timeout), name, len(ids), say)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return Events(form.stream(pieces, len(ids), usage), limits.timeout + LAST_WORDS, leave)
        try:
            return await _unless_gone(http, form.whole(pieces, len(ids)))
        finally:
            leave()

    @app.post("/v1/chat/completions")
    async def chat(http: Request, asked: ChatAsked):
        model = find(asked.model)
        assistant = model.assistant
        if assistant.chat is None:
            raise Refusal(400, problem(f"{assistant.name} cannot chat: {assistant.why_no_chat}. /v1/completions goes on with a text"))
        messages = [message.plain() for message in asked.messages]
        if assistant.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": assistant.system_prompt})
        try:
            ids = await asyncio.to_thread(render_prompt, assistant.chat, messages)
        except (Refused, ValueError) as error:
            raise Refusal(400, problem(f"the checkpoint's chat template cannot write these messages: {error}", param="messages")) from None
        return await answer(http, asked, model, ids, ChatForm(assistant.name))

    @app.post("/v1/completions")
    async def complete(http: Request, asked: CompletionAsked):
        model = find(asked.model)
        ids, vocabulary = asked.prompt, model.assistant.model.config.vocab_size
        if isinstance(ids, str):
            ids = await asyncio.to_thread(_encode, model.assistant.tokenizer, ids)
        if not ids or any(not 0 <= token < vocabulary for token in ids):
            raise Refusal(400, problem(f"prompt: expected a text, or token ids from 0 to {vocabulary - 1}", param="prompt"))
        return await answer(http, asked, model, ids, TextForm(model.assistant.name))

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [_described(model.assistant, began) for model in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        return _described(find(name).assistant, began)

    @app.get("/health")
    async def health():
        problems = {name: model.batcher.problem for name, model in models.items() if model.batcher.problem}
        state = {"status": "failing" if problems else "ok", "models": active, "uptime_seconds": int(time.time()) - began}
        return JSONResponse(state | ({"problems": problems} if problems else {}), 503 if problems else 200)

    @app.post("/votes")
    async def vote(cast: Vote):
        chosen, rejected = find(cast.chosen_model).assistant, find(cast.rejected_model).assistant
        prompt = [message.plain() for message in cast.messages]
        if cast.chosen == cast.rejected:
            raise Refusal(400, problem("both answers are the same, so there is nothing to prefer"))
        if prompt[-1]["role"] != "user":
            raise Refusal(400, problem("the last message must be the user's: it is what both answered", param="messages"))
        if prompt[0]["role"] != "system" and chosen.system_prompt and chosen.system_prompt == rejected.system_prompt:
            prompt.insert(0, {"role": "system", "content": chosen.system_prompt})
        try:
            await asyncio.to_thread(votes.add, prompt, cast.chosen, cast.rejected, cast.chosen_model, cast.rejected_model)
        except OSError as error:
            raise Refusal(507, problem(f"the vote could not be written: {error.strerror}", "server_error")) from None
        return {"saved": True}

    @app.get("/")
    async def page():
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    @app.get("/page/{name}")
    async def asset(name: str):
        path = PAGE / name
        if path.suffix not in KINDS or path not in set(PAGE.iterdir()):
            raise HTTPException(404, "there is no such page")
        return FileResponse(path, headers=HEADERS, media_type=KINDS[path.suffix])

    return Walls(app, api_key, limits.body, any_host)


def _encode(tokenizer, text: str) -> list[int]:
    """A text to go on with, and what the tokenizer puts before any text."""
    return text_prefix(tokenizer) + encode_text(tokenizer, text)


def _described(assistant: Assistant, began: int) -> dict:
    """OpenAI's model object, with what the page shows besides."""
    about = {"max_model_len": assistant.context, "chat": assistant.chat is not None, "system_prompt": assistant.system_prompt}
    about |= {"suggestions": assistant.suggestions}
    return {"id": assistant.name, "object": "model", "created": began, "owned_by": "posttrain", **about}


def _invalid(_, error: RequestValidationError) -> JSONResponse:
    """What is wrong with a request, without repeating what it said."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:] if str(part).isidentifier() or isinstance(part, int))
    message = {"extra_forbidden": "is not an option of this server, so it would be ignored"}.get(first["type"], first["msg"])
    message = message.removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        where, message = "", "the body is not valid JSON"
    return JSONResponse(problem(f"{where}: {message}" if where else message, param=where or None), 400)


async def _pieces(model: Model, ids: list[int], sampling, stops: list[str], timeout: float) -> AsyncIterator[Piece]:
    """An answer as it comes. Raises EngineFailed, and TimeoutError where it takes longer than `timeout` seconds."""
    text, count, end, said, new = TextStream(model.assistant.tokenizer, ids, stops), 0, "length", "", []
    async with contextlib.aclosing(model.batcher.generate(ids, sampling, timeout)) as tokens:
        async for new in tokens:
            count += len(new)
            stopped = bool(new) and new[-1] in model.assistant.stops
            said = text.feed(new[:-1] if stopped else new)
            if stopped or text.stopped:
                end = "stop"
                break
            if count >= sampling.max_tokens:
                break
            yield Piece(said, len(new))
    yield Piece(said + text.end(), len(new), end)


async def _noted(pieces: AsyncIterator[Piece], name: str, prompt: int, say: Callable[[str], None]) -> AsyncIterator[Piece]:
    """Passes an answer's pieces on, and says in the end how it went."""
    began, first, tokens, how = time.perf_counter(), None, 0, "gone"
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                first = first or time.perf_counter() - began
                tokens += piece.tokens
                how = piece.end or how
                yield piece
    except (TimeoutError, EngineFailed) as error:
        how = "timeout" if isinstance(error, TimeoutError) else "failed"
        raise
    finally:
        seconds = time.perf_counter() - began
        say(f"{name}  {how:<7}  {prompt} + {tokens} tokens  first {1000 * (first or seconds):.0f} ms  all {seconds:.2f} s")


class Events(StreamingResponse):
    """Server-sent events. However the response ends, what makes them ends with it, and `leave` is called.

    It ends after `seconds`, too: a client that stops reading would hold its place for ever.
    """

    def __init__(self, events: AsyncIterator[str], seconds: float, leave: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no", "Cache-Control": "no-store"})
        self.events, self.seconds, self.leave = events, seconds, leave

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with contextlib.aclosing(self.events):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.seconds):
                        await super().__call__(scope, receive, send)
        finally:
            self.leave()


class Form:
    """How answers of one endpoint look."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, model: str):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def choice(self, text: str, end: str | None) -> dict:
        raise NotImplementedError

    def delta(self, text: str, end: str | None, first: bool) -> dict:
        raise NotImplementedError

    async def whole(self, pieces, prompt: int) -> JSONResponse:
        text, tokens, end = "", 0, None
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    text, tokens, end = text + piece.text, tokens + piece.tokens, piece.end
        except TimeoutError:
            return JSONResponse(problem("the answer took longer than the server's time limit", "timeout_error"), 504)
        except EngineFailed as error:
            return JSONResponse(problem(f"generation failed: {error}", "server_error"), 500)
        content = {**self.head, "object": self.kind, "choices": [self.choice(text, end)], "usage": _usage(prompt, tokens)}
        return JSONResponse(content)

    async def stream(self, pieces, prompt: int, usage: bool) -> AsyncIterator[str]:
        """Server-sent events, one for each piece that says something; an error after the first is an event of its own."""
        head, tokens, first = {**self.head, "object": self.chunk_kind}, 0, True
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    tokens += piece.tokens
                    if piece.text or piece.end or first:
                        yield _event({**head, "choices": [self.delta(piece.text, piece.end, first)]})
                        first = False
            if usage:
                yield _event({**head, "choices": [], "usage": _usage(prompt, tokens)})
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield _event(problem("the answer took longer than the server's time limit", "timeout_error"))
        except EngineFailed as error:
            yield _event(problem(f"generation failed: {error}", "server_error"))


class ChatForm(Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, text, end):
        return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end, "logprobs": None}

    def delta(self, text, end, first):
        return {"index": 0, "delta": ({"role": "assistant"} if first else {}) | {"content": text}, "finish_reason": end, "logprobs": None}


class TextForm(Form):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, text, end):
        return {"index": 0, "text": text, "finish_reason": end, "logprobs": None}

    def delta(self, text, end, first):
        return self.choice(text, end)


def _usage(prompt: int, tokens: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _unless_gone(http: Request, work) -> JSONResponse:
    """The response, unless the client leaves: then the work ends, too."""
    task = asyncio.ensure_future(work)

    async def wait_until_gone():
        while (await http.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(wait_until_gone())
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return JSONResponse({}, 499)
    return task.result()
