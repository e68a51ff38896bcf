"""One optimizer step, one validation, one look at a step's examples: the work of the loop, the same for SFT and DPO.

The one invariant: a step's loss is divided by the totals of the whole step, which every rank computes from the plan. So the curve does
not depend on ranks, micro-batches or ZeRO stage.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from posttrain.data import batches
from posttrain.data.packing import MicroBatch
from posttrain.data.prepared import PreparedData, Split
from posttrain.engine.update import apply_update, backward
from posttrain.objectives.likelihood import SFT
from posttrain.objectives.preference import DPO
from posttrain.parallel import watchdog
from posttrain.parallel.ranks import gathered
from posttrain.recipes.keys import Recipe
from posttrain.training.spikes import StepGuard


class Ahead:
    """Builds the next micro-batch of training in a thread, and copies it to the device, while this one is worked on."""

    def __init__(self, training: "Training"):
        self.training, self.thread = training, ThreadPoolExecutor(1, thread_name_prefix=watchdog.AHEAD)
        self.expected: tuple[tuple[int, int], Future] | None = None  # step and number of the micro-batch, and what will be it

    def get(self, step: int, number: int, parts: list[np.ndarray]) -> MicroBatch:
        """Micro-batch `number` of this rank's `parts` of a step; the one after it is begun."""
        key, future = self.expected or (None, None)
        batch = future.result() if key == (step, number) else self._build(parts[number])
        if number + 1 < len(parts):
            self.expected = (step, number + 1), self.thread.submit(self._build, parts[number + 1])
        else:
            self.expected = (step + 1, 0), self.thread.submit(self._first_of, step + 1)
        return batch

    def _first_of(self, step: int) -> MicroBatch:
        return self._build(step_share(self.training, step)[1][0])

    def _build(self, part: np.ndarray) -> MicroBatch:
        if self.training.device.type == "cuda":  # a thread begins on the first GPU, where a context would take memory
            torch.cuda.set_device(self.training.device)
        return self.training.data.train.micro_batch(part).to(self.training.device)


@dataclass
class Training:
    """What every step works on."""

    recipe: Recipe
    engine: Any  # DeepSpeed's, around the policy
    data: PreparedData
    objective: SFT | DPO
    guard: StepGuard = field(init=False)
    ahead: Ahead = field(init=False)
    votes: dict[str, Callable[[], bool]] = field(default_factory=dict)  # what each rank is asked at the end of every step
    counted: dict[str, int] = field(default_factory=dict)  # and on how many ranks the answer was yes, the same on all

    def __post_init__(self):
        self.guard = StepGuard(self.recipe.skip_spikes)
        self.ahead = Ahead(self)

    @property
    def device(self) -> torch.device:
        return self.engine.device


def my_micro_batches(indices: np.ndarray, lengths: np.ndarray, recipe: Recipe) -> list[np.ndarray]:
    """This rank's micro-batches of the examples `indices`; `lengths` are those of all examples, in tokens."""
    limits = {"max_tokens": recipe.max_tokens_per_gpu, "packing": recipe.packing}
    return batches.share_of_rank(indices, lengths, **limits, rank=dist.get_rank(), world_size=dist.get_world_size())


def step_share(training: Training, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The examples of a step, and this rank's micro-batches of them."""
    recipe, train = training.recipe, training.data.train
    indices = batches.step_examples(len(train), recipe.global_batch_size, recipe.seed, step)
    return indices, my_micro_batches(indices, train.lengths, recipe)


def train_step(training: Training, step: int, apply: bool = True) -> tuple[dict[str, float], str | None]:
    """One optimizer step: its metrics over all ranks, and why it was not applied (None: it was). All ranks.

    With apply=False weights and optimizer stay as they are whatever the step's numbers, which are judged all the same.
    """
    recipe, engine, objective, train = training.recipe, training.engine, training.objective, training.data.train
    watchdog.enter("data", step)
    indices, mine = step_share(training, step)
    totals = objective.totals(train, indices)
    sums = torch.zeros(len(objective.sums), dtype=torch.float64, device=training.device)
    if recipe.dropout:  # its masks follow the seed, differ between ranks, and are drawn again alike after a resume
        torch.manual_seed((recipe.seed << 32) + step * dist.get_world_size() + dist.get_rank())
    if step == 1:
        # The run's largest micro-batch goes first, with weight 0: memory fails now or never, and the gradients are the same bits
        try_largest(training)
    for i in range(len(mine)):
        watchdog.enter("data")
        batch = training.ahead.get(step, i, mine)
        watchdog.enter("forward")
        loss, part_sums = objective.loss(batch, totals)
        watchdog.enter("backward")
        backward(engine, loss, is_last=i == len(mine) - 1)
        sums += part_sums
    watchdog.enter("step")
    votes = sums.new_tensor([float(ask()) for ask in training.votes.values()])
    metrics = _reduce(objective, sums, totals, votes)
    training.counted = dict(zip(training.votes, map(round, votes.tolist()), strict=True))
    can_apply = apply and math.isfinite(metrics["loss"])
    metrics["grad_norm"], applied = apply_update(engine, training.guard.largest_norm if can_apply else -1.0)
    reason = training.guard.judge(metrics["loss"], metrics["grad_norm"])
    assert applied == (apply and reason is None), (applied, reason)  # what the gate decided is what is told
    training.guard.count(step, reason, metrics["grad_norm"])
    return metrics, reason


def try_largest(training: Training) -> int:
    """Forward and backward of the run's largest micro-batch, with weight 0; its tokens. All ranks."""
    train, examples = training.data.train, _largest(training.recipe, training.data.train)
    loss, _ = training.objective.loss(train.micro_batch(examples).to(training.device), training.objective.totals(train, examples))
    backward(training.engine, loss * 0.0, is_last=False)
    return int(train.lengths[examples].sum())


@torch.no_grad()
def evaluate(training: Training) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics over the validation set, every example once, weighted as in training, and numbers of each example by name. All ranks."""
    recipe, objective, validation = training.recipe, training.objective, training.data.validation
    count = min(len(validation), recipe.eval_iters * recipe.global_batch_size or len(validation))
    indices = np.arange(count)
    sums = torch.zeros(len(objective.sums), dtype=torch.float64, device=training.device)
    totals, examples = objective.totals(validation, indices), {}
    training.engine.eval()
    for part in my_micro_batches(indices, validation.lengths, recipe):
        watchdog.enter("eval")
        sums += objective.loss(validation.micro_batch(part).to(training.device), totals, examples)[1]
    training.engine.train()
    shares = gathered({name: np.concatenate(values) for name, values in examples.items()})
    everyones = {name: np.concatenate([share[name] for share in shares if name in share]) for name in shares[0]}
    return _reduce(objective, sums, totals), everyones


@torch.no_grad()
def example_losses(training: Training, step: int) -> list[dict]:
    """Every example of a step with its own loss, the worst first; on all ranks. All ranks."""
    train = training.data.train
    indices, mine = step_share(training, step)
    if step == 1:  # the run's largest micro-batch ran with it, with weight 0: a loss that is not finite spoils the step even so
        mine = [*mine, np.array(_largest(training.recipe, train))]
    losses: dict[int, float] = {}
    training.engine.eval()
    for part in mine:
        values = training.objective.example_losses(train.micro_batch(part).to(training.device))
        losses |= dict(zip(part.tolist(), values.tolist(), strict=True))
    training.engine.train()
    merged = {index: loss for one in gathered(losses) for index, loss in one.items()}
    members = set(indices.tolist())
    return [
        {
            "index": index,
            "source": train.table[index]["source"],
            "tokens": int(train.lengths[index]),
            "loss": merged[index] if math.isfinite(merged[index]) else None,
            "weight": int(index in members),
        }
        for index in sorted(merged, key=lambda index: (math.isfinite(merged[index]), -merged[index]))
    ]


def _largest(recipe: Recipe, split: Split) -> list[int]:
    limits = recipe.global_batch_size, recipe.max_tokens_per_gpu, dist.get_world_size(), recipe.packing
    return batches.largest_micro_batch(split.lengths, *limits)


def _reduce(objective: SFT | DPO, sums: torch.Tensor, totals: dict[str, int], votes: torch.Tensor | None = None) -> dict[str, float]:
    """Sums of all ranks -> metrics; `votes` travel along and are summed in place. Forces a device sync. All ranks."""
    votes = sums.new_empty(0) if votes is None else votes
    everything = torch.cat([sums, votes])
    dist.all_reduce(everything)
    votes.copy_(everything[len(sums) :])
    return objective.metrics(dict(zip(objective.sums, everything[: len(sums)].tolist(), strict=True)), totals)
