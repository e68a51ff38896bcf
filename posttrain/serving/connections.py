"""Bounds what connections take: how long a request's head may take to arrive, and how many connections there may be.

uvicorn (0.54) has neither: whoever sends half a head, often enough, would hold every file that the process may open.
"""

import asyncio
import resource

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 10.0  # from a connection, or the first byte of a further request, to the end of the head
SPARE_FILES = 200  # that the process opens besides connections
MOST_FILES = 65_536


def raise_limit() -> None:
    """Let this process open as many files as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """Return how many connections leave enough files for all else, at least 16."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max((MOST_FILES if soft == resource.RLIM_INFINITY else soft) - SPARE_FILES, 16)


class Connection(AutoHTTPProtocol):  # ty: ignore[unsupported-base]
    """A client's connection, which is cut where a head takes too long to arrive, and at once where there are too many."""

    head: asyncio.TimerHandle | None = None  # set while a request's head is awaited

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.abort()
        else:
            self._await_head()

    def connection_lost(self, exc) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self.head is None and (before is None or before.response_complete):
            self._await_head()
        super().data_received(data)
        if self.cycle is not before:
            self._head_is_there()

    def _await_head(self) -> None:
        self.head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _head_is_there(self) -> None:
        if self.head is not None:
            self.head.cancel()
            self.head = None
