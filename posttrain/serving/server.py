"""Serves checkpoints, as posttrain/serve.py reads them from its command line: listens, loads, and answers until interrupted."""

import argparse
import asyncio
import gc
import logging
import os
import socket
import time

import torch

from posttrain.common import gpus, terminal
from posttrain.model import assistant
from posttrain.model.assistant import dtype_on
from posttrain.model.command_line import trusted_places
from posttrain.serving.access import is_loopback
from posttrain.serving.answers import Model
from posttrain.serving.app import LAST_WORDS, Limits, build
from posttrain.serving.batching import Batcher, EngineFailed
from posttrain.serving.connections import BACKLOG, Server, configured, raise_limit
from posttrain.serving.lines import Lines
from posttrain.serving.sampling import Sampling
from posttrain.serving.vllm_batching import VLLMBatcher, is_installed, why_not
from posttrain.serving.votes import Votes

Engine = type[Batcher] | type[VLLMBatcher]


def serve(options: argparse.Namespace) -> None:
    """Load the checkpoints of a command line and serve them until interrupted; posttrain/serve.py describes the options."""
    options.device = options.device or gpus.usual_device()
    assistant.quiet_libraries()
    raise_limit()
    folder = options.preferences.parent
    if not folder.is_dir() or options.preferences.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--preferences {options.preferences} cannot be written; expected a file in a folder that is there")
    # before any model is loaded, so that a port that is taken is not found out minutes later
    with listen(options.host, options.port, options.timeout + LAST_WORDS) as listener:
        engine = _engine(options.engine, options.device)
        asyncio.run(_serve(options, listener, engine, _load(options, engine)))


async def _serve(options: argparse.Namespace, listener: socket.socket, engine: Engine, loaded: list[assistant.Assistant]) -> None:
    """Start generation, then answer on the listening socket."""
    models = await _start(options, engine, loaded)
    limits = Limits(options.max_batch, options.max_queue, options.timeout, options.max_body)
    key = os.environ.get("POSTTRAIN_API_KEY")
    lines = Lines()
    logging.getLogger("uvicorn").addHandler(lines)
    built = build(models, limits, Votes(options.preferences), key, options.host, lambda line: lines.say(_stamped(line)))
    who = "on this machine" if is_loopback(options.host) else "who reaches it"
    host = f"[{options.host}]" if ":" in options.host else options.host
    if not key and not is_loopback(options.host):
        _say("warning: without POSTTRAIN_API_KEY everybody who reaches this address may use the models and read their system prompts")
    _say(f"chat at http://{host}:{listener.getsockname()[1]}" + ("" if key else f"; anyone {who} may use it"))
    gc.collect()
    gc.freeze()  # else a collection in between would walk over all that was loaded, and hold Python's lock for half a second
    # of a request that is none uvicorn would say so, as often as it gets one
    await Server(configured(built, access_log=False, log_level="error", log_config=None)).serve(sockets=[listener])
    lines.end()


def listen(host: str, port: int, patience: float) -> socket.socket:
    """Return a socket that listens on the port, 0 for any free one. Raises ValueError where it is taken, or not this machine's.

    The connection to a client that for `patience` seconds reads nothing of what it was sent is cut; closing it would wait without end.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only where the protocol is named; else every first token takes 40 ms longer
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * patience))
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}. Name another with --host or --port") from error
    return listener


def _engine(asked: str, device: str) -> Engine:
    """Return what generates. Raises ValueError for --engine vllm where vLLM cannot serve on the device."""
    if asked == "transformers":
        return Batcher
    reason = why_not(device)
    if reason is None:
        return VLLMBatcher
    if asked == "vllm":
        raise ValueError(f"--engine vllm: {reason}. --engine transformers does without it")
    if is_installed():
        _say(f"warning: transformers generates, since {reason}")
    return Batcher


def _load(options: argparse.Namespace, engine: Engine) -> list[assistant.Assistant]:
    """Load all checkpoints."""
    places = trusted_places(options.checkpoint, options)
    if options.device == "cpu":  # each model generates in a thread of its own
        torch.set_num_threads(max(1, torch.get_num_threads() // len(places)))
    dtype = dtype_on(options.device, options.dtype)
    device = options.device if engine is Batcher else "cpu"  # vLLM's own process puts it where it generates
    return [assistant.load(place, name, options.tokenizer, dtype, device) for name, place in places.items()]


async def _start(options: argparse.Namespace, engine: Engine, loaded: list[assistant.Assistant]) -> dict[str, Model]:
    """Start generation for every model, once all are loaded: each takes its share of the memory that is left for caches."""
    models, started = {}, []
    try:
        for one in loaded:
            batcher = engine(one, options.max_batch, len(loaded), len(started))
            batcher.start()
            started.append(batcher)
            seconds = await _warm_up(batcher, min(one.stops, default=0))
            models[one.name] = Model(one._replace(context=batcher.room), batcher)
            _introduce(one, batcher, options.device, seconds)
    except BaseException:  # an interrupt, too: vLLM's processes would outlive this one
        for batcher in started:
            batcher.stop()
        raise
    return models


def _introduce(one: assistant.Assistant, batcher: Batcher | VLLMBatcher, device: str, seconds: float) -> None:
    """Print what is served, and what it cannot do."""
    about = f"{one.model.num_parameters():,} parameters, {batcher.room:,} tokens, {str(one.model.dtype).removeprefix('torch.')}"
    _say(f"{one.name}: {about} on {device} by {batcher.name}; first answer after {seconds:.1f} s")
    if batcher.room < one.context_in_batches:
        _say(f"warning: {one.name} could read {one.context_in_batches:,} tokens; the memory left for its cache holds {batcher.room:,}")
    if one.context_in_batches < one.context:
        _say(
            f"warning: {one.name} could read {one.context:,} tokens, one text at a time; it is served with {one.context_in_batches:,}, "
            "since longer texts would have the rotary frequencies of the longest that is read at the same time"
        )
    if one.chat is None:
        _say(f"warning: {one.name} cannot chat, only continue a text: {one.why_no_chat}")


async def _warm_up(batcher: Batcher | VLLMBatcher, token: int) -> float:
    """Generate a first token, which pays for all that is done once, and return its seconds. Raises ValueError where none comes."""
    began = time.perf_counter()
    try:
        async for _ in batcher.generate([token], Sampling(1), 600):
            pass
    except EngineFailed as error:
        other = ". What it printed says more; --engine transformers does without it" if isinstance(batcher, VLLMBatcher) else ""
        raise ValueError(f"{batcher.name} cannot generate from {batcher.assistant.name}: {error}{other}") from error
    return time.perf_counter() - began


def _say(line: str) -> None:
    terminal.say(_stamped(line))


def _stamped(line: str) -> str:
    return f"{time.strftime('%H:%M:%S')}  {line}"
