"""Reads what clients send in processes of their own: large JSON, chat templates, tokenizers.

A template may loop, and a megabyte takes its time. In a thread of the server that would hold Python's lock, which generation needs several
hundred times a token; in a process with a lower priority it delays those who wait for the same process only.
"""

import asyncio
import gc
import json
import multiprocessing
import os
import signal
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import NoReturn

from pydantic import ValidationError

from posttrain.common.errors import first_line
from posttrain.common.limits import bound_memory
from posttrain.data.chat import render_prompt
from posttrain.data.encoding import encode_text, text_prefix
from posttrain.data.parts import Refused
from posttrain.model.assistant import Assistant
from posttrain.serving.connections import MOST_FILES
from posttrain.serving.schema import Strict

SMALL_BODY = 16_000  # bytes of JSON that take so little time that they are read at once
LONG_TEXT = 20_000  # characters of a prompt from which on it is read beside the others
READ_SECONDS = 20.0  # that one piece of work may take; a template has 5, see own_template.py
LONGEST_NAME = 200  # characters that a refusal repeats of a field's name
NICE = 10  # how far the priority is lowered
MEMORY = 2 * 2**30  # bytes that a process may take beyond what it began with


class Unreadable(ValueError):
    """A request that cannot be read; `args` are the message and OpenAI's `param`."""


class NoReader(OSError):
    """Says that the system allows no further process."""


class Reader:
    """A process that does one kind of work. It is started anew where the work does not end, or the process has ended."""

    def __init__(self, work: Callable):
        """`work` gets what is given to `read`; what it raises has to be one of Python's own errors, or Unreadable."""
        self.work, self.thread, self.lock = work, ThreadPoolExecutor(1, "reader"), threading.Lock()
        self.process: int | None = None  # the number of the process, while it is not waited for, so that the number is still its own
        self.stopped = False
        self._start()

    def _start(self) -> None:
        with self.lock:
            if self.stopped:
                raise NoReader("the server ends")
            self.pipe, there = multiprocessing.Pipe()
            try:
                self.process = os.fork()
            except OSError as error:
                self.pipe.close()
                raise NoReader(f"the system allows no process to read the request with: {error.strerror}") from error
            finally:
                if self.process != 0:
                    there.close()
        if self.process == 0:
            _work_in_process(there, self.work)
        with socket.socket(fileno=os.dup(self.pipe.fileno())) as both_ways:  # a process that stands still takes nothing from a full pipe
            seconds = int(READ_SECONDS), int(READ_SECONDS % 1 * 1e6)
            both_ways.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", *seconds))

    def stop(self) -> None:
        """End the process, and with it what it does."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.stopped = True
            if self.process is not None:
                os.kill(self.process, signal.SIGKILL)

    def _end(self) -> None:
        """End the process and wait for it, if there is one."""
        with self.lock:
            if self.process is not None:
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                self.pipe.close()
            self.process = None

    async def read(self, *given):
        """Return what the work makes of this, after what was asked for before.

        Raises what the work raises, Unreadable where it fails, and NoReader where no process can be started.
        """
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._read, given)

    def _read(self, given: tuple):
        if not self._is_there():  # it was ended, here or from outside, or could not be started anew
            self._start()
        result = Unreadable(f"reading the request took longer than {READ_SECONDS:.0f} seconds", None)
        try:
            self.pipe.send(given)
            if self.pipe.poll(READ_SECONDS):
                result = self.pipe.recv()
            else:
                self._end()
        except BlockingIOError:
            self._end()
        except (OSError, EOFError):
            result = Unreadable("reading the request ended the process that read it; it may take too much memory", None)
            self._end()
        if isinstance(result, Exception):
            raise result
        return result

    def _is_there(self) -> bool:
        """Whether the process is there, and reads."""
        with self.lock:
            if self.process is None or os.waitpid(self.process, os.WNOHANG) == (0, 0):
                return self.process is not None
            self.process = None
            self.pipe.close()
            return False


def _work_in_process(pipe: Connection, work: Callable) -> NoReturn:
    """Do the work on what comes through the pipe, in a process that was forked for it, until the other end is closed."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the server ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.closerange(3, pipe.fileno())  # the server's connections, and the pipes of other readers
        os.closerange(pipe.fileno() + 1, MOST_FILES)
        os.nice(NICE)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not here
        gc.freeze()  # else the first collection would copy all pages of what the server has loaded
        bound_memory(MEMORY)
        while True:
            given = pipe.recv()
            try:
                pipe.send(work(*given))
            except Exception as error:  # of any kind, by what a client sent; also where it cannot be sent back
                pipe.send(error if isinstance(error, Unreadable) else Unreadable(f"it cannot be read ({first_line(error)})", None))
    finally:
        os._exit(0)


class PromptReaders:
    """The readers of one model's prompts: long ones have a process of their own, since short ones would wait for them."""

    def __init__(self, assistant: Assistant):
        work = partial(read_prompt, assistant, text_prefix(assistant.tokenizer))
        self.context, self.longest = assistant.context, max(map(len, assistant.tokenizer.get_vocab()))
        self.vocabulary = assistant.model.config.get_text_config().vocab_size
        self.short, self.long = Reader(work), Reader(work)

    def stop(self) -> None:
        """End both."""
        self.short.stop()
        self.long.stop()

    async def read(self, prompt: str | list, turn: Callable[[], Awaitable[None]]) -> list[int]:
        """Return the ids of a text, of messages, or of ids, once it is this request's `turn`; long ones are read before it.

        Raises Unreadable for what makes no prompt, or is too long for the model.
        """
        if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], dict)):
            if len(prompt) >= self.context:
                message = f"the prompt has {len(prompt):,} tokens; this model reads {self.context:,}, and the answer needs some of them"
                raise Unreadable(message, "prompt")
            if not prompt or min(prompt) < 0 or max(prompt) >= self.vocabulary:
                raise Unreadable(f"prompt: expected a text, or token ids from 0 to {self.vocabulary - 1}", "prompt")
            await turn()
            return prompt
        text = len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
        if text > (most := self.context * self.longest):
            raise Unreadable(
                f"the prompt has {text:,} characters; this model reads {self.context:,} tokens, at most {most:,} characters", None
            )
        if text <= LONG_TEXT:
            await turn()
            return await self.short.read(prompt)
        ids = await self.long.read(prompt)
        await turn()
        return ids


def read_prompt(assistant: Assistant, prefix: list[int], prompt: str | list[dict]) -> list[int]:
    """Return the ids of a text to continue, which begins with `prefix`, or of a conversation. Raises Unreadable."""
    if isinstance(prompt, str):
        ids = prefix + encode_text(assistant.tokenizer, prompt)
        if not ids:
            raise Unreadable("prompt: expected a text, or token ids", "prompt")
        return ids
    try:
        return render_prompt(assistant.chat, prompt)
    except (Refused, ValueError) as error:
        raise Unreadable(f"the checkpoint's chat template cannot write these messages: {error}", "messages") from None


def read_body(kind: type[Strict], body: bytes) -> Strict:
    """Return the request that a body's JSON holds. Raises Unreadable with what is wrong with it, without repeating what it said."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable("the body is not valid JSON", None) from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))[:LONGEST_NAME]
    message = {"extra_forbidden": "is not an option of this server, so it would be ignored"}.get(first["type"], first["msg"])
    message = message.removeprefix("Value error, ")
    raise Unreadable(f"{where}: {message}" if where else message, where or None)
