"""Does the same work on many pieces in several processes, of which each holds one piece, and ends them whatever happens.

Workers are forked, so that they have the tokenizer without loading it again, and die with their parent.
"""

import contextlib
import ctypes
import itertools
import math
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Literal, NamedTuple, Self

from posttrain.common.errors import described

PR_SET_PDEATHSIG = 1  # of Linux's prctl


class _Worker(NamedTuple):
    process: int
    connection: Connection


def work_on(pieces: Iterable, work: Callable[[int, Any], Any], most: int) -> Iterator:
    """Yield what work(number, piece) returns for each piece, in the order in which it is done by up to `most` processes.

    A single piece, or one process, is work for this one. Raises what went wrong first, in the order of the pieces, once the pieces before
    it are done; ValueError where a worker was killed.
    """
    numbered = enumerate(pieces)
    first = list(itertools.islice(numbered, 2))
    if most == 1 or len(first) < 2:
        for number, piece in itertools.chain(first, numbered):
            yield work(number, piece)
        return
    with _Pool(work, most) as pool:
        yield from pool.results(itertools.chain(first, numbered))


@contextlib.contextmanager
def beside(work: Callable[[], Any], most: int) -> Iterator[Callable[[], Any]]:
    """Let another process call `work` while the block runs, which gets a function that waits for what it returns, or raises its error.

    With at most one process it is called by this one, where the block asks for it.
    """
    if most == 1:
        yield work
        return
    with _Pool(lambda *_: work(), 1) as pool:
        pool.give(0, None)
        yield lambda: next(pool.rest())


class _Pool:
    """Workers, started as they are needed; those that are left when the block ends are ended."""

    def __init__(self, work: Callable[[int, Any], Any], most: int):
        self.work, self.most = work, most
        self.workers: list[_Worker] = []
        self.idle: list[_Worker] = []
        self.busy: dict[Connection, tuple[int, _Worker]] = {}
        self.failed: dict[float, Exception] = {}  # what went wrong, by the number of the piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> Literal[False]:
        for worker in self.workers:
            if kind:
                os.kill(worker.process, signal.SIGKILL)  # it is not waited for yet, so the number is still its own
            worker.connection.close()
        for worker in self.workers:
            os.waitpid(worker.process, 0)
        return False

    def results(self, numbered: Iterator[tuple[int, Any]]) -> Iterator:
        """Yield the results of numbered pieces, of which one more is read than there are workers. Raises as work_on does."""
        try:
            for number, piece in numbered:
                while not self.idle and len(self.workers) == self.most:
                    yield from self._answers()
                if self.failed:
                    break
                self.give(number, piece)
                del piece  # else it would stay in memory while the next is read
        except Exception as error:
            self.failed[math.inf] = error  # of the reading, which is ahead of all pieces
        yield from self.rest()

    def rest(self) -> Iterator:
        """Yield the results of the pieces that are not done yet. Raises what went wrong first."""
        while self.busy:
            yield from self._answers()
        if self.failed:
            raise self.failed[min(self.failed)]

    def give(self, number: int, piece) -> None:
        """Give a piece to a worker that is idle, or to a new one."""
        worker = self.idle.pop() if self.idle else self._start()
        self.busy[worker.connection] = number, worker
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its death is seen where its answer is awaited
            worker.connection.send_bytes(pickle.dumps((number, piece), pickle.HIGHEST_PROTOCOL))

    def _answers(self) -> Iterator:
        """Wait for a worker, and yield the results that are there."""
        for connection in wait(list(self.busy)):
            assert isinstance(connection, Connection)
            number, worker = self.busy.pop(connection)
            try:
                sound, answer = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                self.failed[number] = self._death(worker)
                continue
            self.idle.append(worker)
            if sound:
                yield answer
            else:
                self.failed[number] = answer

    def _death(self, worker: _Worker) -> ValueError:
        self.workers.remove(worker)
        worker.connection.close()
        code = os.waitstatus_to_exitcode(os.waitpid(worker.process, 0)[1])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        lack = ", as it is where memory is short: --workers with fewer processes takes less" if code == -signal.SIGKILL else ""
        return ValueError(f"a worker of preparation (process {worker.process}) {how}{lack}. The same command goes on from here")

    def _start(self) -> _Worker:
        """Fork a worker. Only this process is interrupted by Ctrl-C, and ends the others."""
        here, there = Pipe()
        parent, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        if not (process := os.fork()):
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                for connection in [here, *(worker.connection for worker in self.workers)]:
                    connection.close()
                if os.getppid() == parent:
                    _serve(there, self.work)
            finally:
                os._exit(0)  # nothing of the parent's is to be done here: no exit handlers, no output that it has not written yet
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()
        self.workers.append(_Worker(process, here))
        return self.workers[-1]


def _serve(connection: Connection, work: Callable[[int, Any], Any]) -> None:
    """Do the work of one worker until there is no more."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not here after a fork, and the other workers use the other cores
    while True:
        try:
            number, piece = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, work(number, piece)
        except Exception as error:
            answer = False, _portable(error)
        del piece
        connection.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))


def _portable(error: Exception) -> Exception:
    """The error as another process can raise it: a mistake of the user's as it is, anything else with where it comes from."""
    if isinstance(error, ValueError) and type(error) is not ValueError:
        error = ValueError(described(error))
    if not isinstance(error, ValueError | OSError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error's own code raises
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error


def cores() -> int:
    """How many cores this process may use: those that it may run on, as far as its control groups give it time on them."""
    here = len(os.sched_getaffinity(0))
    for place, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, *rest = _read(place).split()
            here = min(here, math.ceil(int(quota) / int(rest[0] if rest else _read(period or "")))) if int(quota) > 0 else here
    return max(1, here)


def _read(place: str) -> str:
    """The text of a file of the control groups, as a container sees its own."""
    with open(f"/sys/fs/cgroup/{place}", encoding="ascii") as file:
        return file.read()
