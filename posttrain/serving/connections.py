"""Bounds what connections take: how long a request's head may take to arrive, and how many connections there may be.

uvicorn (0.54) has neither: whoever sends half a head, often enough, would hold every file that the process may open. Where all are taken,
a new client gets the place of the one that has kept the server waiting for its request for longest.
"""

import asyncio
import collections
import itertools
import math
import os
import re
import resource
import socket
import threading
import time
from typing import ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # from a connection, or the first byte of a further request, to the end of the head
MOST_HEAD, MOST_LINES = 16_384, 100  # bytes and lines of a head; reading one of ten thousand lines would take as long as several tokens
SPARE_FILES = 200  # that the process opens besides connections, and for those just accepted, see ACCEPTED
ACCEPTED = 50  # connections that asyncio accepts before it looks at the first of them; those of three rounds may be open at once
PIECE = 32_768  # bytes that are read of a connection at once
PIECE_LINES = 200  # of heads and chunks that are taken at once
REST, LONG_REST = 2.0, 6.0  # from one piece to the next, times the loop's work; the second one before a turn of a frequent sender
SHORTEST_REST, LONGEST_REST = 0.002, 0.03  # seconds
FEW, LATELY = 4, 1.0  # turns, and seconds: a connection that had so many in that time is a frequent sender; a request takes two
BACKLOG = 1024  # connections that wait in the system's queue to be accepted
HEAD_END = b"\r\n\r\n"
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


class Turns:
    """Decides whose piece of data is taken next, of the connections of one server.

    It is that of the connection that sent last: in a burst of hundreds of requests those that come later are not kept waiting by all before
    them. Frequent senders, which had more turns lately than a request takes, come after all others, the longest-waiting first, and every
    fourth time before them. Between two turns the event loop rests, as it holds Python's lock, which generation wants, too: longer before a
    turn of a frequent sender, and any other ends that rest.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.count, self.is_busy = loop, 0, False
        self.began, self.worked = 0.0, 0.0  # the time of the first piece since the last rest, and the seconds of work since then
        self.rest: asyncio.TimerHandle | None = None  # set during one
        self.others: list[Connection] = []  # the newest last
        self.frequent: collections.deque[Connection] = collections.deque()  # the longest-waiting first

    def add(self, connection: "Connection") -> None:
        """Give a connection a turn, now or later."""
        (self.frequent if self.loop.time() - connection.had_turns[0] < LATELY else self.others).append(connection)
        if not self.is_busy:
            self.is_busy = True
            self._rest()
        elif self.rest and self.others:
            self.rest.cancel()
            self._rest()

    def _take(self) -> None:
        """Take a piece of the next connection, and come again in the loop's next round."""
        self.rest = None
        if self._left(LONG_REST) <= 0:
            self.began, self.worked = self.loop.time(), 0.0
        while self.others or self.frequent:
            self.count += 1
            frequent = self.frequent and (not self.others or self.count % 4 == 0)
            connection = self.frequent.popleft() if frequent else self.others.pop()
            if not connection.transport.is_closing():
                worked = time.thread_time()
                connection.had_turns.append(self.loop.time())
                connection.take_piece()
                self.loop.call_soon(self._taken, worked)
                return
        self.is_busy = False

    def _taken(self, before: float) -> None:
        """Note the work since a piece was taken, when the thread had worked `before` seconds, and go on."""
        self.worked += time.thread_time() - before
        self._rest()

    def _rest(self) -> None:
        """Wait until REST times, or LONG_REST times, the work has passed since `began`; then take the next piece.

        Short rests are put together, since a timer takes a millisecond more.
        """
        left = self._left(REST if self.others else LONG_REST)
        if left < SHORTEST_REST:
            self._take()
        else:
            self.rest = self.loop.call_later(left, self._take)

    def _left(self, times: float) -> float:
        """Return how many seconds are left until so many times the work has passed since `began`."""
        return self.began + min(times * self.worked, LONGEST_REST) - self.loop.time()


class Connection(H11Protocol):
    """A client's connection, which is cut where a head takes too long to arrive, and where too many are waiting for their requests.

    What it sends is taken in pieces, when it has a turn, with few lines: a head's line, or a chunk of a body, takes far longer to parse
    than its bytes. What follows a whole request waits for the answer.
    """

    turns: Turns
    piece = b""  # what was read and not taken yet
    has_turn = False  # a turn is coming
    waiting: ClassVar[dict["Connection", None]] = {}  # connections without a whole request, the longest-waiting first
    head: asyncio.TimerHandle | None = None  # set while a request's head is awaited
    head_bytes, head_lines, tail = 0, 0, b""  # of that head so far: how many, and the last three bytes

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.max_size = PIECE  # asyncio reads eight times as much
        self.had_turns = collections.deque([-math.inf] * FEW, maxlen=FEW)  # when the last ones were, in the loop's time
        self.turns = vars(self.server_state).setdefault("turns", Turns(self.loop))
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
        self.piece += data
        self._ask_for_turn()

    def _ask_for_turn(self) -> None:
        """Read on if there is nothing to take; else read nothing more, and ask for a turn, unless a request is being answered."""
        if self.has_turn:
            return
        if not self.piece:
            if not self.flow.read_paused:
                self.transport.resume_reading()
            return
        self.transport.pause_reading()
        if not self._is_answering():
            self.has_turn = True
            self.turns.add(self)

    def _is_answering(self) -> bool:
        """Whether there is a whole request that is not answered yet."""
        return self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)

    def take_piece(self) -> None:
        """Take what comes next of what was read: to the end of a head, and of heads and chunks no more than PIECE_LINES lines."""
        self.has_turn = False
        if self.head is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        end = len(self.piece)
        if self.head is not None:
            end = _end_of_lines(self.piece, b"\n", PIECE_LINES)
        elif any(name == b"transfer-encoding" for name, _ in self.headers):  # a chunk's data may have lines of its own, trailers are few
            end = min(_end_of_lines(self.piece, b"\r\n", PIECE_LINES), _end_of_lines(self.piece, b"\n", 8 * PIECE_LINES))
        if self.head is not None and (found := (self.tail + self.piece).find(HEAD_END)) >= 0:
            end = min(end, found + len(HEAD_END) - len(self.tail))
        data, self.piece = self.piece[:end], self.piece[end:]
        self._take(data)
        if not self.transport.is_closing():
            self._ask_for_turn()

    def _take(self, data: bytes) -> None:
        before = self.cycle
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
        if not self.transport.is_closing():
            self._ask_for_turn()

    def _note(self) -> None:
        """Note whether this connection has a whole request, which is then being answered."""
        if self._is_answering():
            self.waiting.pop(self, None)
        elif not self.transport.is_closing():
            self.waiting.setdefault(self)

    def _is_too_long(self, data: bytes) -> bool:
        """Count what has come of the head, and return whether that is too much."""
        self.head_bytes, self.head_lines = self.head_bytes + len(data), self.head_lines + data.count(b"\n")
        self.tail = (self.tail + data)[-3:]
        return self.head_bytes > MOST_HEAD or self.head_lines > MOST_LINES

    def _await_head(self) -> None:
        self.head_bytes, self.head_lines, self.tail = 0, 0, b""
        self.head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _head_is_there(self) -> None:
        if self.head is not None:
            self.head.cancel()
            self.head = None


def _end_of_lines(data: bytes, line_end: bytes, count: int) -> int:
    """Return where the first `count` lines of some data end, or all of it."""
    last = next(itertools.islice(re.finditer(line_end, data), count - 1, None), None)
    return last.end() if last else len(data)


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
    how = {"http": Connection, "ws": "none", "backlog": ACCEPTED, "server_header": False, "timeout_graceful_shutdown": 3}
    return uvicorn.Config(app, **how, **more)
