"""One answer on its way from a model to a client: generated piece by piece, logged, and sent whole or as a stream in OpenAI's JSON."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import NamedTuple, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from posttrain.model.assistant import Assistant
from posttrain.serving.access import error_object
from posttrain.serving.batching import Batcher, EngineFailed
from posttrain.serving.sampling import Sampling
from posttrain.serving.text import TextStream
from posttrain.serving.vllm_batching import VLLMBatcher

Result = TypeVar("Result")


class Model(NamedTuple):
    """A checkpoint, and what generates from it."""

    assistant: Assistant
    batcher: Batcher | VLLMBatcher


class Piece(NamedTuple):
    """What has come of an answer since the piece before."""

    text: str
    tokens: int  # how many tokens that text is made of
    end: str | None = None  # OpenAI's finish_reason, with the last piece


async def generate(model: Model, prompt: list[int], sampling: Sampling, stops: list[str], timeout: float) -> AsyncIterator[Piece]:
    """Yield the answer to a prompt's token ids as it comes, up to an end token, the first of the texts `stops`, or the token limit.

    Raises EngineFailed, and TimeoutError where the answer is not complete after `timeout` seconds.
    """
    text, count, end, said, new = TextStream(model.assistant.tokenizer, prompt, stops), 0, "length", "", []
    async with contextlib.aclosing(model.batcher.generate(prompt, sampling, timeout)) as tokens:
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


async def logged(
    pieces: AsyncIterator[Piece], name: str, prompt: int, log: Callable[[str], None], begun: Callable[[], None]
) -> AsyncIterator[Piece]:
    """Pass on the pieces of model `name`'s answer to a prompt of `prompt` tokens; then log a line on how it ended, without its text.

    `begun` is called with the first piece.
    """
    began, first, tokens, how = time.perf_counter(), None, 0, "gone"
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if first is None:
                    first = time.perf_counter() - began
                    begun()
                tokens += piece.tokens
                how = piece.end or how
                yield piece
    except (TimeoutError, EngineFailed) as error:
        how = "timeout" if isinstance(error, TimeoutError) else "failed"
        raise
    finally:
        seconds = time.perf_counter() - began
        log(f"{name}  {how:<7}  {prompt} + {tokens} tokens  first {1000 * (first or seconds):.0f} ms  all {seconds:.2f} s")


class Payload:
    """An answer in the JSON of one OpenAI endpoint; each endpoint has a subclass."""

    kind, chunk_kind, prefix = "", "", ""  # OpenAI's names: `object` of a whole answer and of a streamed part, beginning of the id

    def __init__(self, model: str):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def choice(self, text: str, end: str | None) -> dict:
        """Return the one element of a whole answer's `choices`."""
        raise NotImplementedError

    def delta(self, text: str, end: str | None, first: bool) -> dict:
        """Return the one element of `choices` in one event of a stream."""
        raise NotImplementedError

    async def whole(self, pieces: AsyncIterator[Piece], prompt: int) -> JSONResponse:
        """Return the response to a prompt of `prompt` tokens once the answer is complete, or an error with status 504 or 500."""
        text, tokens, end = "", 0, None
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    text, tokens, end = text + piece.text, tokens + piece.tokens, piece.end
        except TimeoutError as error:
            return JSONResponse(_failure(error), 504)
        except EngineFailed as error:
            return JSONResponse(_failure(error), 500)
        content = {**self.head, "object": self.kind, "choices": [self.choice(text, end)], "usage": _usage(prompt, tokens)}
        return JSONResponse(content)

    async def stream(self, pieces: AsyncIterator[Piece], prompt: int, usage: bool) -> AsyncIterator[str]:
        """Yield a server-sent event for each piece that has text, then one with the token counts if `usage`.

        The status has been sent by then, so an error is an event of its own, and the stream ends without [DONE].
        """
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
        except (TimeoutError, EngineFailed) as error:
            yield _event(_failure(error))


class ChatPayload(Payload):
    """The JSON of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, text: str, end: str | None) -> dict:
        return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end, "logprobs": None}

    def delta(self, text: str, end: str | None, first: bool) -> dict:
        return {"index": 0, "delta": ({"role": "assistant"} if first else {}) | {"content": text}, "finish_reason": end, "logprobs": None}


class CompletionPayload(Payload):
    """The JSON of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, text: str, end: str | None) -> dict:
        return {"index": 0, "text": text, "finish_reason": end, "logprobs": None}

    def delta(self, text: str, end: str | None, first: bool) -> dict:
        return self.choice(text, end)


def _failure(error: TimeoutError | EngineFailed) -> dict:
    """Return the error object for an answer that ended before it was complete."""
    if isinstance(error, TimeoutError):
        return error_object("the answer took longer than the server's time limit", "timeout_error")
    return error_object(f"generation failed: {error}", "server_error")


def _usage(prompt: int, tokens: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """A response of server-sent events. However it ends, the generator of its events is closed and `leave` is called.

    It ends after `seconds` at the latest: a client that stops reading would hold its place for ever.
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


class Gone(Exception):
    """Raised where the client has left before its answer was complete."""


async def while_connected(http: Request, work: Coroutine[None, None, Result]) -> Result:
    """Return what `work` does; where the client leaves before, cancel it and raise Gone."""
    task = asyncio.ensure_future(work)

    async def wait_until_gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(wait_until_gone())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    if task.cancelled():
        raise Gone
    return task.result()
