"""Bounds what connections take: how long a request's head may take to arrive, and how many connections there may be.

uvicorn (0.54) has neither: whoever sends half a head, often enough, would hold every file that the process may open. Where all are taken,
a new client gets the place of the one that has kept the server waiting for its request for longest.
"""

import asyncio
import os
import resource
import socket
import threading
import time
from typing import ClassVar

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 10.0  # from a connection, or the first byte of a further request, to the end of the head
MOST_HEAD, MOST_LINES = 16_384, 100  # bytes and lines of a head; reading one of ten thousand lines would take as long as several tokens
SPARE_FILES = 200  # that the process opens besides connections, and for those just accepted, see ACCEPTED
ACCEPTED = 50  # connections that asyncio accepts before it looks at the first of them; those of three rounds may be open at once
PIECE = 32_768  # bytes that are read of a connection at once
REST, LONGEST_REST = 2.0, 0.01  # between two pieces, times what the event loop worked meanwhile, and in seconds
BACKLOG = 1024  # connections that wait in the system's queue to be accepted
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
LEAVE_SECONDS = 9.0  # from a signal to the end of the process, whatever hangs
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
    """A client's connection, which is cut where a head takes too long to arrive, and where too many are waiting for their requests.

    Of all that connections have sent one piece at a time is taken, of the connection that sent last: in a burst of hundreds of requests
    those that come later are not kept waiting by all before them.
    """

    turns: ClassVar[list["Connection"]] = []  # connections with a piece that was not taken yet, the newest last
    is_taking: ClassVar[bool] = False  # _take_turn will be called in the loop's next round
    piece = b""  # what was read and not taken yet
    waiting: ClassVar[dict["Connection", None]] = {}  # connections without a whole request, the longest-waiting first
    head: asyncio.TimerHandle | None = None  # set while a request's head is awaited
    head_bytes, head_lines, tail = 0, 0, b""  # of that head so far: how many, and the last three bytes

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.max_size = PIECE  # asyncio reads eight times as much
        self.waiting[self] = None
        self._await_head()
        if len(self.connections) > most_connections():
            longest = next(iter(self.waiting))
            longest.connections.discard(longest)  # it counts until it is closed, which is not at once
            longest.transport.abort()
            del self.waiting[longest]

    def connection_lost(self, exc) -> None:
        self._head_is_there()
        self.waiting.pop(self, None)
        self.piece = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if Connection.is_taking:
            if not self.piece:
                self.turns.append(self)
                self.transport.pause_reading()
            self.piece += data
            return
        Connection.is_taking = True
        self.loop.call_soon(self._take_turn, self.loop, self.loop.time(), time.thread_time())
        self._take(data)

    @classmethod
    def _take_turn(cls, loop: asyncio.AbstractEventLoop, before: float, worked: float) -> None:
        """Take the piece of the connection that sent last, and come again in a later round while there are others.

        `before` is when the last piece was taken, and `worked` the event loop's processor time until then. It rests between two, as it
        holds Python's lock, which generation wants, too.
        """
        if cls.turns:
            rest = min(before + REST * (time.thread_time() - worked), before + LONGEST_REST) - loop.time()
            if rest > 0:
                loop.call_later(rest, cls._take_turn, loop, before, worked)
                return
        cls.is_taking = False
        while cls.turns:
            newest = cls.turns.pop()
            if not newest.piece or newest.transport.is_closing():
                continue
            cls.is_taking = True
            loop.call_soon(cls._take_turn, loop, loop.time(), time.thread_time())
            piece, newest.piece = newest.piece, b""
            newest._take(piece)
            if not newest.flow.read_paused:
                newest.transport.resume_reading()
            return

    def _take(self, data: bytes) -> None:
        before = self.cycle
        if self.head is None and (before is None or before.response_complete):
            self._await_head()
        if self.head is not None and self._is_too_long(data):
            self.transport.write(TOO_LONG)
            self.transport.close()
            return
        super().data_received(data)
        if self.cycle is not before:
            self._head_is_there()
        self._note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def _note(self) -> None:
        """Note whether this connection has a whole request, which is then being answered."""
        if self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body):
            self.waiting.pop(self, None)
        elif not self.transport.is_closing():
            self.waiting.setdefault(self)

    def _is_too_long(self, data: bytes) -> bool:
        """Count what has come of the head, and return whether that is too much; what follows its end does not count."""
        end = (self.tail + data).find(b"\r\n\r\n")
        new = data if end < 0 else data[:end]
        self.head_bytes, self.head_lines = self.head_bytes + len(new), self.head_lines + new.count(b"\n")
        self.tail = (self.tail + data)[-3:]
        return self.head_bytes > MOST_HEAD or self.head_lines > MOST_LINES

    def _await_head(self) -> None:
        self.head_bytes, self.head_lines, self.tail = 0, 0, b""
        self.head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _head_is_there(self) -> None:
        if self.head is not None:
            self.head.cancel()
            self.head = None


class Server(uvicorn.Server):
    """uvicorn's server, which has a long queue of connections, and has ended LEAVE_SECONDS after a signal."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. asyncio makes the queue as long as the number that it accepts at once, so it is made longer afterwards."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)

    def handle_exit(self, sig, frame) -> None:
        """Begin to end, and see to it that the process does."""
        leave = threading.Timer(LEAVE_SECONDS, os._exit, [128 + sig])
        leave.daemon = True
        leave.start()
        super().handle_exit(sig, frame)


def configured(app, **more) -> uvicorn.Config:
    """Return uvicorn's settings for this application, with these connections."""
    return uvicorn.Config(app, http=Connection, backlog=ACCEPTED, server_header=False, timeout_graceful_shutdown=3, **more)
