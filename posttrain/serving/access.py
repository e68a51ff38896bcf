"""The layer between the network and the application, in plain ASGI: it decides who may ask, and how much.

Its refusals are OpenAI's error objects, so that any client shows them.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers

BODY_SECONDS = 30  # how long a body may take to arrive
LINGER_SECONDS, LINGER_BYTES = 5, 2**26  # how long, and how far, the rest of a refused body is read
PROTECTED = ("/v1/", "/votes")  # paths that need the API key; the page itself and /health reveal nothing


def is_loopback(host: str) -> bool:
    """Whether an address or name to listen on means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def error_object(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class AccessControl:
    """An ASGI application around another one, which never sees what comes from foreign hosts and sites, without the key, or too long."""

    def __init__(self, app, api_key: str | None, max_body: int, host: str):
        """`max_body` is in bytes; `host` is where the server listens. Without a key it answers to its own names and addresses only."""
        self.app, self.api_key, self.max_body = app, api_key, max_body
        self.is_open = not is_loopback(host)
        self.names = {"localhost", "testserver"} | ({host, socket.gethostname()} if self.is_open else set())

    async def __call__(self, scope, receive, send) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # which comes where the server ends
            await self._answer(scope, receive, send)

    async def _answer(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if refused := self._refused(scope, headers):
            return await _send_refusal(receive, send, *refused)
        body, closes = _Body(receive, self.max_body, headers), False

        async def unless_refused(message) -> None:
            """Pass on a message of the answer, unless there will be another; what is not read of the body ends the connection."""
            nonlocal closes
            if body.refused:
                return
            if message["type"] == "http.response.start" and not body.complete:
                closes = True
                message = message | {"headers": [*message.get("headers", []), (b"connection", b"close")]}
            elif closes and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send(message | {"more_body": True})
                await _linger(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, body.receive, unless_refused)
        if body.refused:
            await _send_refusal(receive, send, *body.refused)

    def _is_own(self, host: str | None) -> bool:
        """Whether a Host header's name means this server: one of its names, or an IP address, which no name can be made to look like."""
        try:
            address = ipaddress.ip_address(host or "")
        except ValueError:
            return host in self.names
        return self.is_open or address.is_loopback

    def _refused(self, scope, headers: Headers) -> tuple[int, dict] | None:
        """Return status and error for a request that is refused by its headers."""
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
            origin = urlsplit(headers.get("origin", ""))
        except ValueError:
            return 400, error_object("the Host or Origin header is not an address")
        if not self.api_key and not self._is_own(host):  # a web page whose name was made to mean this address (DNS rebinding)
            return 403, error_object(
                f"this server answers to {', '.join(sorted(self.names))} and IP addresses only; with an API key it answers to any name"
            )
        if "origin" in headers and origin.netloc != headers.get("host"):
            return 403, error_object("pages of other sites may not use this server")
        if self.api_key and scope["path"].startswith(PROTECTED):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode("latin-1"), self.api_key.encode()):  # as sent, in UTF-8
                return 401, error_object("the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key")
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, error_object("the body must be JSON, sent as Content-Type: application/json")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 20 or int(length) > self.max_body:
            return 413, error_object(f"the request has {length[:20]} bytes; at most {self.max_body:,} are read")
        return None


class _Body:
    """A request's body, counted and timed as it arrives. To the application, one too long or too slow looks like a client that left."""

    def __init__(self, receive, most: int, headers: Headers):
        self.inner, self.most, self.received = receive, most, 0
        self.complete = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self.deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self.refused: tuple[int, dict] | None = None  # status and error

    async def receive(self) -> dict:
        if self.complete:
            return await self.inner()
        try:
            message = await asyncio.wait_for(self.inner(), self.deadline - asyncio.get_running_loop().time())
        except TimeoutError:
            self.refused = 408, error_object(f"the body did not arrive within {BODY_SECONDS} seconds")
            return {"type": "http.disconnect"}
        self.received += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.received > self.most:
            self.refused = 413, error_object(f"the request has more than {self.most:,} bytes")
            return {"type": "http.disconnect"}
        return message


async def _send_refusal(receive, send, status: int, content: dict) -> None:
    """Send a refusal at once, and read on for a while before hanging up.

    Most clients look for an answer only when they have sent everything, and what arrives at a closed connection makes their system throw
    the answer away.
    """
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await _linger(receive)
    await send({"type": "http.response.body", "body": b""})


async def _linger(receive) -> None:
    """Read on what comes of a request's body, for a while."""
    read = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while read < LINGER_BYTES and (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                read += len(message.get("body", b""))
