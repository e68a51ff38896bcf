"""Holds what every step of a run works on, and deals the run's examples to steps, ranks and micro-batches."""

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
from posttrain.operators import positions
from posttrain.parallel import watchdog
from posttrain.recipes.keys import Recipe
from posttrain.training.spikes import StepGuard


class Share(NamedTuple):
    """One optimizer step: its examples, as indices, and this rank's micro-batches of them."""

    step: int
    examples: np.ndarray
    micro_batches: list[np.ndarray]


@dataclass
class Training:
    """What every step works on: recipe, engine, data, objective, and the state that is kept between steps."""

    recipe: Recipe
    max_tokens: int  # most tokens in a micro-batch: the recipe's max_tokens_per_gpu, or what `auto` has found
    engine: TrainingEngine
    data: PreparedData
    objective: SFT | DPO
    guard: StepGuard = field(init=False)
    ahead: "Ahead" = field(init=False)
    share: Callable[[int], Share] = field(init=False)  # step -> its Share, which is dealt only once

    def __post_init__(self):
        self.guard = StepGuard(self.recipe.skip_spikes)
        self.ahead = Ahead(self)
        self.set_max_tokens(self.max_tokens)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.engine.device

    @property
    def model(self):
        """The transformers model inside the policy."""
        return self.engine.module.model

    @property
    def context(self) -> int:
        """How many tokens a text that the model reads, or writes, may have in all."""
        return positions.context_of(self.model.config.get_text_config())

    def set_max_tokens(self, max_tokens: int) -> None:
        """Limit micro-batches to `max_tokens` tokens from now on."""
        self.max_tokens = max_tokens
        self.share = lru_cache(maxsize=2)(self._deal)  # of this step and of the next one, which is dealt ahead

    def _deal(self, step: int) -> Share:
        """Deal the examples of a step."""
        recipe, train = self.recipe, self.data.train
        examples = batches.step_examples(len(train), recipe.global_batch_size, recipe.seed, step)
        return Share(step, examples, self.micro_batches(examples, train.lengths))

    def micro_batches(self, examples: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Return this rank's micro-batches of `examples`, as indices; `lengths` are the tokens of the split's examples."""
        return my_micro_batches(examples, lengths, self.max_tokens, self.recipe.packing)

    @property
    def largest_micro_batch(self) -> list[int]:
        """Training examples that make up a micro-batch with as many tokens as any of the run can have."""
        limits = self.recipe.global_batch_size, self.max_tokens, dist.get_world_size(), self.recipe.packing
        return batches.largest_micro_batch(self.data.train.lengths, *limits)


def my_micro_batches(examples: np.ndarray, lengths: np.ndarray, max_tokens: int, packing: bool) -> list[np.ndarray]:
    """Deal `examples` to all ranks; returns this rank's micro-batches, as indices. `lengths` are the tokens of the split's examples."""
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return batches.share_of_rank(examples, lengths, max_tokens=max_tokens, packing=packing, **ranks)


class Ahead:
    """Prefetches: a thread builds the next training micro-batch and copies it to the device while the current one is computed."""

    def __init__(self, training: Training):
        self.training, self.thread = training, ThreadPoolExecutor(1, thread_name_prefix=watchdog.AHEAD)
        self.expected: tuple[tuple[int, int], Future] | None = None  # (step, number) of the micro-batch, and its future

    def batches(self, share: Share) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a step, in order."""
        for number in range(len(share.micro_batches)):
            watchdog.enter("data")
            yield self.get(share, number)

    def get(self, share: Share, number: int) -> MicroBatch:
        """Return micro-batch `number` of a share, and begin to build the one after it, at the end the next step's first."""
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
        if self.training.device.type == "cuda":  # a new thread is on the first GPU, where it would make a context, which takes memory
            torch.cuda.set_device(self.training.device)
        return self.training.data.train.micro_batch(examples).to(self.training.device)
