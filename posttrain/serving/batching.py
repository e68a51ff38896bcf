"""Continuous batching of one model's requests, by transformers' own manager: a request joins the others between two tokens.

This file adds sampling settings for each request, with a seed that gives the same answer whoever else is served, and delivers outputs to
the request that asked, or to nobody once it has ended.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import ClassVar, NamedTuple

import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.logits_process import LogitsProcessorList

from posttrain.common.errors import first_line
from posttrain.model.assistant import Assistant
from posttrain.operators.heads import heads_of
from posttrain.serving.sampling import Sampling, choose

PAGE = 64  # tokens of a page of the KV cache; requests with the same beginning share whole pages
CPU_BATCH_TOKENS = 512  # tokens of a forward pass; transformers' attention mask has as many rows, and a column for every cached token
CPU_CACHE = 2 * 2**30  # bytes of all models' KV caches and attention masks on a CPU, at most
SMALL_CACHE = 2**29  # bytes that those of a model may take on a CPU, even if its weights take less
USUAL_REQUEST = 4096  # tokens of a request; a CPU's cache holds as many times so many as requests are generated at once, if it may
HANG_SECONDS = 120.0  # without a step, after which generation is taken to hang


class EngineFailed(RuntimeError):
    """Raised where generation ended with an error; its text is the cause."""


class Batcher:
    """Generates the answers of one model, in a thread of its own."""

    name = "transformers"

    def __init__(self, assistant: Assistant, most: int, models: int = 1, started: int = 0):
        """`most` requests are generated at once, others wait. `models` share the device's memory, and `started` have taken their share.

        Raises ValueError for an architecture that would compute each request's attention over all requests, unnoticed (transformers 5.23).
        """
        self.assistant, self.numbers = assistant, itertools.count()
        model = assistant.model
        if not model.is_backend_compatible():
            raise ValueError(
                f"{assistant.name} is a {type(model).__name__}, whose attention is its own, so that transformers cannot generate many "
                "answers with it at once: it can neither be served nor compared by its answers; eval_benchmarks.py measures it"
            )
        on_cpu = model.device.type == "cpu"
        settings = ContinuousBatchingConfig(
            page_size=PAGE,
            max_requests_per_batch=most,
            use_async_batching=False,  # the sampler needs the token before
            use_cuda_graph=False,
            num_blocks=_cpu_blocks(assistant, most, CPU_CACHE // models) if on_cpu else None,
            max_batch_tokens=CPU_BATCH_TOKENS if on_cpu else None,
            max_memory_percent=None if on_cpu else 0.8 / (models - started),
        )
        self.manager = model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=sorted(assistant.stops)), settings)
        self.outputs = self.manager.output_router = _Outputs()
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList())
        processors.logits_processor = LogitsProcessorList([_Sampler(self._fail)])
        processors.tensors_required, processors.do_processing = 1, True
        processors.supported_keys = {"sampling": Sampling}
        self.manager.logit_processor = processors
        self.last_step, step = time.monotonic(), self.manager._generation_loop_body

        def noted_step(*arguments, **named) -> bool:
            self.last_step = time.monotonic()
            return step(*arguments, **named)

        self.manager._generation_loop_body = noted_step  # runs ten times a second at least, requests or not

    def _fail(self, request: str, why: str) -> None:
        """End one request with an error, from the thread that generates; whoever asked cancels it."""
        if (callback := self.outputs.callbacks.get(request)) is not None:
            callback(_Failed(why))

    @property
    def failure(self) -> str | None:
        """Why nothing can be generated, any more or for now; None while it can."""
        if not self.manager.is_running():
            return f"generation has ended: {self.manager.background_thread_status.fatal_error}"
        if (seconds := time.monotonic() - self.last_step) > HANG_SECONDS:
            return f"generation hangs: its last step began {seconds:.0f} seconds ago"
        return None

    @property
    def room(self) -> int:
        """How many tokens a request may have in all, known once one was served. A longer one would end all generation."""
        return min(self.assistant.context_in_batches, (self.manager.batch_processor.cache.num_blocks - 1) * PAGE)

    def start(self) -> None:
        """Start the thread."""
        self.last_step = time.monotonic()
        self.manager.start()

    def stop(self) -> None:
        """End all generation."""
        self.manager.stop(block=True, timeout=3, hard_stop=True)

    async def generate(self, prompt: list[int], sampling: Sampling, timeout: float) -> AsyncIterator[list[int]]:
        """Yield the new ids of the answer to a prompt's ids as they come, up to the end token included. Closing it ends the request.

        Raises EngineFailed, and TimeoutError where the answer is not complete after `timeout` seconds, waiting included.
        """
        if self.failure:
            raise EngineFailed(self.failure)
        request, loop, arrived = f"r{next(self.numbers)}", asyncio.get_running_loop(), asyncio.Queue()
        deadline = loop.time() + timeout
        self.outputs.callbacks[request] = lambda output: loop.call_soon_threadsafe(arrived.put_nowait, output)
        finished, sent = False, 0
        try:
            if self.manager.add_request(prompt, request, sampling.max_tokens, streaming=True, sampling=sampling) is None:
                raise EngineFailed("generation is ending")
            while not finished:
                try:
                    output = await asyncio.wait_for(arrived.get(), min(1.0, deadline - loop.time()))
                except TimeoutError:
                    if self.failure:
                        raise EngineFailed(self.failure) from None
                    if loop.time() >= deadline:
                        raise
                    continue
                if output.error is not None:
                    raise EngineFailed(output.error)
                finished = output.is_finished()
                yield output.generated_tokens[sent:]
                sent = len(output.generated_tokens)
        finally:
            del self.outputs.callbacks[request]
            if not finished:
                self.manager.cancel_request(request)


class _Failed(NamedTuple):
    """An output, as the manager gives them, that says why a request has ended without an answer."""

    error: str


class _Outputs(OutputRouter):
    """Delivers each output to the request that asked.

    transformers 5.23's own router keeps what arrives for a cancelled request in a queue that nobody reads.
    """

    def __init__(self):
        super().__init__()
        self.callbacks: dict[str, Callable] = {}

    def deliver(self, output) -> None:
        if (callback := self.callbacks.get(output.request_id)) is not None:
            callback(output)

    def deliver_batch(self, outputs) -> None:
        for output in outputs:
            self.deliver(output)


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Chooses each request's next token by its Sampling, and masks all others: the manager takes the likeliest of what is left."""

    supported_kwargs: ClassVar = {"sampling": Sampling}
    ignored_kwargs = ()

    def __init__(self, fail: Callable[[str, str], None]):
        """`fail` ends a request, by its id, for a reason: an exception here would end the generation of all."""
        super().__init__()
        self.fail = fail

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token) -> torch.Tensor:
        """Note each request's settings; the manager calls this right before the forward pass, in the order of its logits."""
        states = [request.state for request in requests_with_new_token]
        self.asked = [state.logit_processor_kwargs["sampling"] for state in states]
        self.requests = [state.request_id for state in states]
        # the manager restarts a request that the cache had no room for, with its answer so far as part of the prompt
        before = [len(state.initial_tokens) - (state._true_initial_tokens or len(state.initial_tokens)) for state in states]
        positions = [count + len(state.generated_tokens) for count, state in zip(before, states, strict=True)]
        self.uniforms = [sampling.uniform(at) if sampling.temperature else 0 for sampling, at in zip(self.asked, positions, strict=True)]
        self.histories = [
            state.initial_tokens + state.generated_tokens if sampling.repetition_penalty != 1 else []
            for sampling, state in zip(self.asked, states, strict=True)
        ]
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        broken = (~scores.amax(-1).isfinite()).nonzero()[:, 0].tolist()  # a NaN is the largest
        for row in broken:
            self.fail(self.requests[row], "the model gives numbers that are not finite: its weights are damaged, or its training diverged")
        if broken:
            scores[broken] = 0.0
        try:
            chosen = choose(scores.clone(), self.asked, self.histories, self.uniforms)
        except Exception:  # of any kind, by the settings of one of them
            chosen = torch.cat([self._alone(scores, row) for row in range(len(scores))])
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)

    def _alone(self, scores: torch.Tensor, row: int) -> torch.Tensor:
        """Choose the next id, (1,), of one request, or end it if that cannot be done."""
        try:
            return choose(scores[row : row + 1].clone(), *([values[row]] for values in (self.asked, self.histories, self.uniforms)))
        except Exception as error:
            self.fail(self.requests[row], f"its settings cannot be sampled with ({first_line(error)})")
            return scores[row : row + 1].argmax(-1)


def _cpu_blocks(assistant: Assistant, most: int, size: int) -> int:
    """Return how many pages the KV cache gets: for `most` usual requests or one of full length, as far as `size` bytes go.

    A model that is small gets less than `size`, however many positions its config.json claims, and none gets half of the free memory.
    """
    config, pages = assistant.model.config.get_text_config(), -(-assistant.context_in_batches // PAGE)
    of_token = 2 * sum(heads.keys * heads.width for heads in heads_of(config)) + CPU_BATCH_TOKENS
    weights = sum(weight.nbytes for weight in assistant.model.parameters())
    size = min(size, max(SMALL_CACHE, weights), psutil.virtual_memory().available // 2)
    wanted = max(pages, most * min(pages, USUAL_REQUEST // PAGE)) + 1
    return max(2, min(wanted, size // (of_token * assistant.model.dtype.itemsize * PAGE)))
