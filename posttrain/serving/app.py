"""The web application: OpenAI's endpoints over one or more checkpoints, and the chat page that uses them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from posttrain.model.assistant import Assistant
from posttrain.serving.access import AccessControl, error_object
from posttrain.serving.answers import ChatPayload, CompletionPayload, EventStream, Gone, Model, Payload, generate, logged, while_connected
from posttrain.serving.places import Place, Places
from posttrain.serving.reading import SMALL_BODY, NoReader, PromptReaders, Reader, Unreadable, read_body
from posttrain.serving.sampling import Sampling
from posttrain.serving.schema import ChatRequest, CompletionRequest, GenerationRequest, Strict, Vote
from posttrain.serving.votes import Votes

Kind = TypeVar("Kind", bound=Strict)
PAGE = Path(__file__).parent / "page"
ESCAPED, ROOM = 12, 100_000  # bytes of JSON that a character takes at most, and those of what is no prompt
LAST_WORDS = 10.0  # seconds beyond the time limit in which a client may read that it was exceeded
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
    """What a server takes on at most."""

    batch: int  # requests of a model that are generated at once
    queue: int  # requests of a model that may wait
    timeout: float  # seconds that an answer may take
    body: int  # bytes of a request


class Refusal(Exception):
    """Raised to answer a request with an error; `kind`, `param` and `code` are those of error_object."""

    def __init__(self, status: int, message: str, kind="invalid_request_error", *, param=None, code=None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.content, self.headers = status, error_object(message, kind, param, code), headers


class Endpoints:
    """The endpoints of a server, one method each: from a request to its response. They raise Refusal where there is none to give."""

    def __init__(self, models: dict[str, Model], limits: Limits, votes: Votes, log: Callable[[str], None]):
        """`models` are by the name that requests give; `log` gets a line for each answer, without its text."""
        self.models, self.limits, self.votes, self.log = models, limits, votes, log
        self.began = int(time.time())
        self.places: dict[str, Places] = {}
        self.places |= {name: Places(limits.batch, limits.queue, self.places) for name in models}
        self.prompts = {name: PromptReaders(model.assistant) for name, model in models.items()}
        self.bodies = Reader(read_body)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Stop all generation when the server ends."""
        try:
            yield
        finally:
            for reader in (self.bodies, *self.prompts.values()):
                reader.stop()
            await asyncio.gather(*(asyncio.to_thread(model.batcher.stop) for model in self.models.values()))

    async def chat(self, http: Request) -> Response:
        """Answer a conversation, written in the checkpoint's own chat template and with its own system prompt."""
        request = await self._body(http, ChatRequest)
        model = self._find(request.model)
        assistant = model.assistant
        if assistant.chat is None:
            raise Refusal(400, f"{assistant.name} cannot chat: {assistant.why_no_chat}. /v1/completions continues a text")
        messages = [message.plain() for message in request.messages]
        if assistant.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": assistant.system_prompt})
        return await self._answer(http, request, model, messages, ChatPayload(assistant.name))

    async def complete(self, http: Request) -> Response:
        """Continue a text, or token ids, as they are."""
        request = await self._body(http, CompletionRequest)
        model = self._find(request.model)
        return await self._answer(http, request, model, request.prompt, CompletionPayload(model.assistant.name))

    async def list_models(self, _: Request) -> Response:
        """Describe every model."""
        return JSONResponse({"object": "list", "data": [_described(model.assistant, self.began) for model in self.models.values()]})

    async def one_model(self, http: Request) -> Response:
        """Describe one model."""
        return JSONResponse(_described(self._find(http.path_params["name"]).assistant, self.began))

    async def health(self, _: Request) -> Response:
        """Return how many requests each model has; status 503 and the reasons if a model's generation has ended."""
        problems = {name: model.batcher.failure for name, model in self.models.items() if model.batcher.failure}
        active = {name: places.taken for name, places in self.places.items()}
        state = {"status": "failing" if problems else "ok", "models": active, "uptime_seconds": int(time.time()) - self.began}
        return JSONResponse(state | ({"problems": problems} if problems else {}), 503 if problems else 200)

    async def vote(self, http: Request) -> Response:
        """Save which of two answers was preferred."""
        cast = await self._body(http, Vote)
        chosen, rejected = self._find(cast.chosen_model).assistant, self._find(cast.rejected_model).assistant
        prompt = [message.plain() for message in cast.messages]
        if cast.chosen == cast.rejected:
            raise Refusal(400, "both answers are the same, so there is nothing to prefer")
        if prompt[-1]["role"] != "user":
            raise Refusal(400, "the last message must be the user's: it is what both answered", param="messages")
        if prompt[0]["role"] != "system" and chosen.system_prompt and chosen.system_prompt == rejected.system_prompt:
            prompt.insert(0, {"role": "system", "content": chosen.system_prompt})
        try:
            await asyncio.to_thread(self.votes.add, prompt, cast.chosen, cast.rejected, cast.chosen_model, cast.rejected_model)
        except OSError as error:
            raise Refusal(507, f"the vote could not be written: {error.strerror}", "server_error") from None
        return JSONResponse({"saved": True})

    def _find(self, name: str) -> Model:
        if name not in self.models:
            there = ", ".join(self.models)
            raise Refusal(404, f"there is no such model; there are: {there}", param="model", code="model_not_found")
        return self.models[name]

    async def _body(self, http: Request, kind: type[Kind]) -> Kind:
        """Return the request that a body holds. Raises Refusal."""
        try:
            body = await http.body()
            self._refuse_endless(body, kind)
            return read_body(kind, body) if len(body) < SMALL_BODY else await while_connected(http, self.bodies.read(kind, body))
        except Unreadable as error:
            message, param = error.args
            raise Refusal(400, message, param=param) from None
        except NoReader as error:
            raise Refusal(503, str(error), "server_error") from None
        except (ClientDisconnect, Gone):
            raise Refusal(499, "the client has left") from None

    def _refuse_endless(self, body: bytes, kind: type[Strict]) -> None:
        """Raise Refusal for a prompt that is far longer than any model here reads, without reading its JSON."""
        most = max(one.context * one.longest for one in self.prompts.values())
        if issubclass(kind, GenerationRequest) and len(body) > ESCAPED * most + ROOM:
            message = f"the request has {len(body):,} bytes; the models here read at most {most:,} characters"
            raise Refusal(400, message, code="context_length_exceeded")

    async def _answer(self, http: Request, request: GenerationRequest, model: Model, prompt: str | list, payload: Payload) -> Response:
        """Answer a prompt, a text, messages or ids, whole or as a stream, as the request asks.

        The time limit counts from here on: reading a prompt takes a place, and time, as generating does.
        """
        place, began = self._take_place(model), time.monotonic()
        try:
            ids = await self._read(http, model, prompt, place)
            sampling, stops = _sampling(request, len(ids), model.assistant.context)
        except BaseException:
            place.leave()
            raise
        name, timeout = model.assistant.name, self.limits.timeout - (time.monotonic() - began)
        pieces = logged(generate(model, ids, sampling, stops, timeout), name, len(ids), self.log, place.answered)
        if request.stream:
            usage = request.stream_options is not None and request.stream_options.include_usage
            return EventStream(payload.stream(pieces, len(ids), usage), timeout + LAST_WORDS, place.leave)
        try:
            return await while_connected(http, payload.whole(pieces, len(ids)))
        except Gone:
            return Response(status_code=499)
        finally:
            place.leave()

    async def _read(self, http: Request, model: Model, prompt: str | list, place: Place) -> list[int]:
        """Return the ids of a prompt, as PromptReaders does. Raises Refusal."""
        try:
            reading = while_connected(http, self.prompts[model.assistant.name].read(prompt, place.wait))
            return await asyncio.wait_for(reading, self.limits.timeout)
        except Unreadable as error:
            message, param = error.args
            raise Refusal(400, message, param=param, code="context_length_exceeded" if "this model reads" in message else None) from None
        except NoReader as error:
            raise Refusal(503, str(error), "server_error") from None
        except Gone:
            raise Refusal(499, "the client has left") from None
        except TimeoutError:
            raise Refusal(504, "the prompt was not read within the server's time limit", "timeout_error") from None

    def _take_place(self, model: Model) -> Place:
        """Take a place of the model's. Raises Refusal where none is free."""
        if model.batcher.failure:
            raise Refusal(503, model.batcher.failure, "server_error")
        places = self.places[model.assistant.name]
        if (place := places.take()) is None:
            message = f"{places.taken} requests are running or waiting, which is the limit; try again later"
            raise Refusal(429, message, "rate_limit_error", code="queue_full", headers={"Retry-After": "1"})
        return place


async def page(_: Request) -> Response:
    """Send the chat page."""
    return FileResponse(PAGE / "index.html", headers=HEADERS)


async def asset(http: Request) -> Response:
    """Send a file that the chat page loads; status 404 for any other."""
    path = PAGE / http.path_params["name"]
    if path.suffix not in KINDS or path not in set(PAGE.iterdir()):
        raise HTTPException(404, "there is no such page")
    return FileResponse(path, headers=HEADERS, media_type=KINDS[path.suffix])


def build(
    models: dict[str, Model], limits: Limits, votes: Votes, api_key: str | None, host: str, log: Callable[[str], None]
) -> AccessControl:
    """Return the ASGI application. `host` is as for AccessControl, the rest as for Endpoints."""
    endpoints = Endpoints(models, limits, votes, log)
    routes = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.complete, methods=["POST"]),
        Route("/v1/models", endpoints.list_models),
        Route("/v1/models/{name:path}", endpoints.one_model),
        Route("/health", endpoints.health),
        Route("/votes", endpoints.vote, methods=["POST"]),
        Route("/", page),
        Route("/page/{name}", asset),
    ]
    failed = error_object("the server failed; its log says more", "server_error")
    handlers = {
        HTTPException: lambda _, error: JSONResponse(error_object(str(error.detail)), error.status_code, error.headers),
        Refusal: lambda _, error: JSONResponse(error.content, error.status, error.headers),
        Exception: lambda _, error: JSONResponse(failed, 500),
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=endpoints.lifespan)
    return AccessControl(app, api_key, limits.body, host)


def _sampling(request: GenerationRequest, prompt: int, context: int) -> tuple[Sampling, list[str]]:
    """Return how to sample the answer to a prompt of `prompt` tokens, and the texts that end it. Raises Refusal for what cannot be done."""
    try:
        return request.sampling(prompt, context), request.stops()
    except ValueError as error:
        raise Refusal(400, str(error), code="context_length_exceeded" if "tokens" in str(error) else None) from None


def _described(assistant: Assistant, began: int) -> dict:
    """Return OpenAI's model object, with what the page shows besides."""
    about = {"max_model_len": assistant.context, "chat": assistant.chat is not None, "system_prompt": assistant.system_prompt}
    about |= {"suggestions": assistant.suggestions}
    return {"id": assistant.name, "object": "model", "created": began, "owned_by": "posttrain", **about}
