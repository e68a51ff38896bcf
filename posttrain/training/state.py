"""What every step of a run works on, and how the run's examples are dealt to steps, ranks and micro-batches."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed as dist

from posttrain.data import batches
from posttrain.data.packing import MicroBatch
from posttrain.data.prepared import PreparedData
from posttrain.engine.update import TrainingEngine
from posttrain.objectives.likelihood import SFT
from posttrain.objectives.preference import DPO
from posttrain.parallel import watchdog
from posttrain.recipes.keys import Recipe
from posttrain.training.spikes import StepGuard


class Share(NamedTuple):
    """One optimizer step as it is dealt: its examples, and this rank's micro-batches of them."""

    step: int
    examples: np.ndarray
    micro_batches: list[np.ndarray]


@dataclass
class Training:
    """What every step works on."""

    recipe: Recipe
    max_tokens: int  # of a micro-batch; the recipe's max_tokens_per_gpu, or what `auto` has found
    engine: TrainingEngine
    data: PreparedData
    objective: SFT | DPO
    guard: StepGuard = field(init=False)
    ahead: "Ahead" = field(init=False)
    share: Callable[[int], Share] = field(init=False)  # of a step, dealt once

    def __post_init__(self):
        self.guard = StepGuard(self.recipe.skip_spikes)
        self.ahead = Ahead(self)
        self.set_max_tokens(self.max_tokens)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def model(self):
        """The transformers model inside the policy."""
        return self.engine.module.model

    def set_max_tokens(self, max_tokens: int) -> None:
        """Let micro-batches have at most so many tokens from now on."""
        self.max_tokens = max_tokens
        self.share = lru_cache(maxsize=2)(self._deal)  # this step's, and the next one's, which is dealt ahead

    def _deal(self, step: int) -> Share:
        recipe, train = self.recipe, self.data.train
        examples = batches.step_examples(len(train), recipe.global_batch_size, recipe.seed, step)
        return Share(step, examples, self.micro_batches(examples, train.lengths))

    def micro_batches(self, examples: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """This rank's micro-batches of `examples`; `lengths` are those of all examples, in tokens."""
        return my_micro_batches(examples, lengths, self.max_tokens, self.recipe.packing)

    @property
    def largest_micro_batch(self) -> list[int]:
        """Training examples of as many tokens as any micro-batch of the run can have."""
        limits = self.recipe.global_batch_size, self.max_tokens, dist.get_world_size(), self.recipe.packing
        return batches.largest_micro_batch(self.data.train.lengths, *limits)


def my_micro_batches(examples: np.ndarray, lengths: np.ndarray, max_tokens: int, packing: bool) -> list[np.ndarray]:
    """Deal `examples` to all ranks, and return this rank's micro-batches; `lengths` are those of all examples, in tokens."""
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return batches.share_of_rank(examples, lengths, max_tokens=max_tokens, packing=packing, **ranks)


class Ahead:
    """Builds the next micro-batch of training in a thread, and copies it to the device, while this one is worked on."""

    def __init__(self, training: Training):
        self.training, self.thread = training, ThreadPoolExecutor(1, thread_name_prefix=watchdog.AHEAD)
        self.expected: tuple[tuple[int, int], Future] | None = None  # step and number of the micro-batch, and what will be it

    def batches(self, share: Share) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step, in order."""
        for number in range(len(share.micro_batches)):
            watchdog.enter("data")
            yield self.get(share, number)

    def get(self, share: Share, number: int) -> MicroBatch:
        """Micro-batch `number` of a share; the one after it, at the end the next step's first, is begun."""
        key, future = self.expected or (None, None)
        batch = future.result() if key == (share.step, number) else self._build(share.micro_batches[number])
        if number + 1 < len(share.micro_batches):
            self.expected = (share.step, number + 1), self.thread.submit(self._build, share.micro_batches[number + 1])
        else:
            self.expected = (share.step + 1, 0), self.thread.submit(self._first_of, share.step + 1)
        return batch

    def _first_of(self, step: int) -> MicroBatch:
        return self._build(self.training.share(step).micro_batches[0])

    def _build(self, examples: np.ndarray) -> MicroBatch:
        if self.training.device.type == "cuda":  # a thread begins on the first GPU, where a context would take memory
            torch.cuda.set_device(self.training.device)
        return self.training.data.train.micro_batch(examples).to(self.training.device)
