"""What stands between the network and the application, as plain ASGI: who may ask, and how much.

Answers of this layer have OpenAI's error form, so that any client shows them.
"""

import asyncio
import contextlib
import hmac
import json
from urllib.parse import urlsplit

from starlette.datastructures import Headers

LOOPBACK = {"localhost", "127.0.0.1", "::1", "testserver"}
BODY_SECONDS = 30
LINGER_SECONDS = 5  # for the rest of a refused body
PROTECTED = ("/v1/", "/votes")  # what an API key guards; the page itself and /health hold nothing


def problem(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Walls:
    """Refuses foreign hosts and sites, wrong or missing keys, bodies that are no JSON or too long."""

    def __init__(self, app, api_key: str | None, max_body: int, any_host: bool):
        """`max_body`: bytes. `any_host`: whether the server is meant to be reached by other names than this machine's own."""
        self.app, self.api_key, self.max_body, self.any_host = app, api_key, max_body, any_host

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if refused := self._refused(scope, headers):
            return await _answer(receive, send, *refused)
        body = _Body(receive, self.max_body)

        async def unless_refused(message) -> None:
            if body.refused is None:
                await send(message)

        await self.app(scope, body.receive, unless_refused)
        if body.refused:
            await _answer(receive, send, *body.refused)

    def _refused(self, scope, headers: Headers) -> tuple[int, dict] | None:
        """Status and error of a request that goes no further."""
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
            origin = urlsplit(headers.get("origin", ""))
        except ValueError:
            return 400, problem("the Host or Origin header is no address")
        if not self.any_host and host not in LOOPBACK:  # a web page whose name was made to mean 127.0.0.1 (DNS rebinding)
            return 403, problem("this server answers to localhost and 127.0.0.1 only; start it with --host to be reached by other names")
        if "origin" in headers and origin.netloc != headers.get("host"):
            return 403, problem("pages of other sites may not use this server")
        if self.api_key and scope["path"].startswith(PROTECTED):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self.api_key.encode()):
                return 401, problem("the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key")
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, problem("the body must be JSON, sent as Content-Type: application/json")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body:
            return 413, problem(f"the request has {length[:20]} bytes; at most {self.max_body:,} are read")
        return None


class _Body:
    """A request's body as it arrives. One that is too long or too slow reads as a client that has gone."""

    def __init__(self, receive, most: int):
        self.inner, self.most, self.received, self.complete = receive, most, 0, False
        self.deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self.refused: tuple[int, dict] | None = None  # status and error

    async def receive(self) -> dict:
        if self.complete:
            return await self.inner()
        try:
            message = await asyncio.wait_for(self.inner(), self.deadline - asyncio.get_running_loop().time())
        except TimeoutError:
            self.refused = 408, problem(f"the body did not arrive within {BODY_SECONDS} seconds")
            return {"type": "http.disconnect"}
        self.received += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.received > self.most:
            self.refused = 413, problem(f"the request has more than {self.most:,} bytes")
            return {"type": "http.disconnect"}
        return message


async def _answer(receive, send, status: int, content: dict) -> None:
    """Answers at once, and reads on before it hangs up: most clients look for an answer only when they have sent everything, and what
    arrives at a closed connection makes their system throw the answer away."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b""})
