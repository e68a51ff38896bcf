"""Makes one optimizer step, one validation, or computes the loss of each of a step's examples; the same for SFT and DPO.

The one invariant: a step's loss is divided by the totals of the whole step, which every rank computes from the plan. So the curve does
not depend on ranks, micro-batches or ZeRO stage.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed as dist

from posttrain.model.sample_rows import packed_rows, sample_rows
from posttrain.objectives.answers import add_sums
from posttrain.objectives.likelihood import SFT
from posttrain.objectives.preference import DPO
from posttrain.parallel import watchdog
from posttrain.parallel.ranks import gathered
from posttrain.training.state import Training

Questions = dict[str, Callable[[], bool]]  # by name: yes-no questions that every rank is asked at the end of a step


class StepResult(NamedTuple):
    """The result of a step, the same on all ranks."""

    metrics: dict[str, float]
    refused: str | None  # why the step was not applied, None if it was
    yes: dict[str, int]  # on how many ranks the answer to each question was yes
    tokens: int  # of the step's examples


def train_step(training: Training, step: int, questions: Questions | None = None, apply: bool = True) -> StepResult:
    """Make optimizer step `step`, counted from 1. All ranks.

    With apply=False weights and optimizer stay as they are, whether or not the step would have been applied.
    """
    recipe, engine, objective, train = training.recipe, training.engine, training.objective, training.data.train
    watchdog.enter("data", step)
    share = training.share(step)
    totals = objective.totals(train, share.examples)
    sums: dict[str, torch.Tensor] = {}
    if recipe.dropout:  # masks follow from seed, step and rank, so that a resumed run draws the same
        torch.manual_seed((recipe.seed << 32) + step * dist.get_world_size() + dist.get_rank())
    if step == 1:
        # The run's largest micro-batch goes first, with weight 0: memory fails now or never, and the gradients are the same bits
        try_largest(training)
    for number, batch in enumerate(training.ahead.batches(share), start=1):
        watchdog.enter("forward")
        loss, part_sums = objective.loss(batch, totals)
        watchdog.enter("backward")
        engine.backward(loss, is_last=number == len(share.micro_batches))
        add_sums(sums, part_sums)
    watchdog.enter("step")
    answers = [float(ask()) for ask in (questions or {}).values()]
    metrics, votes = _reduce(objective, sums, totals, answers)
    can_apply = apply and math.isfinite(metrics["loss"])
    metrics["grad_norm"], applied = engine.update(training.guard.largest_norm if can_apply else -1.0)
    refused = training.guard.judge(metrics["loss"], metrics["grad_norm"])
    assert applied == (apply and refused is None), (applied, refused)  # the engine's gate and the guard decided alike
    training.guard.count(step, refused, metrics["grad_norm"])
    yes = dict(zip(questions or {}, map(round, votes), strict=True))
    return StepResult(metrics, refused, yes, int(train.lengths[share.examples].sum()))


def try_largest(training: Training) -> int:
    """Run forward and backward of the run's largest micro-batch with weight 0, which changes no gradient; returns its tokens. All ranks."""
    train, examples = training.data.train, training.largest_micro_batch
    loss, _ = training.objective.loss(train.micro_batch(examples).to(training.device), training.objective.totals(train, examples))
    training.engine.backward(loss * 0.0, is_last=False)
    return int(train.lengths[examples].sum())


@torch.no_grad()
def evaluate(training: Training) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the validation metrics, weighted as in training, and by name arrays with one number an example. All ranks."""
    recipe, objective, validation = training.recipe, training.objective, training.data.validation
    indices = np.arange(min(len(validation), recipe.eval_iters * recipe.global_batch_size or len(validation)))
    totals, sums, examples = objective.totals(validation, indices), {}, {}
    training.engine.eval()
    for part in training.micro_batches(indices, validation.lengths):
        watchdog.enter("eval")
        add_sums(sums, objective.loss(validation.micro_batch(part).to(training.device), totals, examples)[1])
    training.engine.train()
    shares = gathered({name: np.concatenate(values) for name, values in examples.items()})
    everyones = {name: np.concatenate([share[name] for share in shares if name in share]) for name in shares[0]}
    return _reduce(objective, sums, totals)[0], everyones


@torch.no_grad()
def sampled_logps(training: Training) -> torch.Tensor:
    """Return the policy's log-probs of sample_rows, (N,) in float32 on the CPU. All ranks."""
    training.engine.eval()
    logps = training.engine(packed_rows(sample_rows(training.model.config.get_text_config())).to(training.device)).float().cpu()
    training.engine.train()
    return logps


@torch.no_grad()
def example_losses(training: Training, step: int) -> list[dict]:
    """Return a record of every example of a step with its own loss, the worst first. All ranks."""
    train = training.data.train
    _, indices, mine = training.share(step)
    if step == 1:  # the run's largest micro-batch ran with it, and even with weight 0 a loss that is not finite spoils the step
        mine = [*mine, np.array(training.largest_micro_batch)]
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
            "source": train[index]["source"],
            "tokens": int(train.lengths[index]),
            "loss": merged[index] if math.isfinite(merged[index]) else None,
            "weight": int(index in members),
        }
        for index in sorted(merged, key=lambda index: (math.isfinite(merged[index]), -merged[index]))
    ]


def _reduce(
    objective: SFT | DPO, sums: dict[str, torch.Tensor], totals: dict[str, int], answers: list[float] | None = None
) -> tuple[dict[str, float], list[float]]:
    """Add up `sums` and `answers` over ranks; returns metrics, and the summed answers. Forces a device sync. All ranks."""
    values = torch.stack(list(sums.values()))
    everything = torch.cat([values, values.new_tensor(answers or [])])
    dist.all_reduce(everything)
    found = everything.tolist()
    return objective.metrics(dict(zip(sums, found, strict=False)), totals), found[len(sums) :]
