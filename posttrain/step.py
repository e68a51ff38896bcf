"""One optimizer step, one validation, one look at a step's examples: the work of the loop, the same for SFT and DPO.

The one invariant: a step's loss is divided by the totals of the whole step, which every rank computes from the plan. So the curve does
not depend on ranks, micro-batches or ZeRO stage.
"""

import math

import numpy as np
import torch
from torch import distributed as dist

from posttrain import batches
from posttrain import engine as engines
from posttrain.config import Recipe
from posttrain.data import Split
from posttrain.guard import StepGuard
from posttrain.objectives import DPO, SFT


def step_share(recipe: Recipe, split: Split, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The examples of a step, and this rank's micro-batches of them."""
    indices = batches.step_examples(len(split), recipe.global_batch_size, recipe.seed, step)
    return indices, batches.my_share(indices, split.lengths, recipe, dist.get_rank(), dist.get_world_size())


def train_step(
    recipe: Recipe, engine, split: Split, objective: SFT | DPO, step: int, device, guard: StepGuard, apply: bool = True
) -> tuple[dict[str, float], str | None]:
    """One optimizer step: its metrics over all ranks, and why it was not applied (None: it was). All ranks."""
    indices, mine = step_share(recipe, split, step)
    totals = objective.totals(split, indices)
    sums = torch.zeros(len(objective.sums), dtype=torch.float64, device=device)
    if recipe.dropout:  # its masks follow the seed, differ between ranks, and are drawn again alike after a resume
        torch.manual_seed((recipe.seed << 32) + step * dist.get_world_size() + dist.get_rank())
    if step == 1:
        # The run's largest micro-batch goes first, with weight 0: memory fails now or never, and the gradients are the same bits
        loss, _ = objective.loss(split.micro_batch(_largest(recipe, split)).to(device), totals)
        engines.backward(engine, loss * 0.0, is_last=False)
    for i, part in enumerate(mine):
        loss, part_sums = objective.loss(split.micro_batch(part).to(device), totals)
        engines.backward(engine, loss, is_last=i == len(mine) - 1)
        sums += part_sums
    metrics = _reduce(objective, sums, totals)
    can_apply = apply and math.isfinite(metrics["loss"])
    metrics["grad_norm"], applied = engines.update(engine, guard.largest_norm if can_apply else -1.0)
    reason = guard.judge(metrics["loss"], metrics["grad_norm"])
    assert applied == (apply and reason is None), (applied, reason)  # what the gate decided is what is told
    guard.count(step, reason, metrics["grad_norm"])
    return metrics, reason


@torch.no_grad()
def evaluate(recipe: Recipe, engine, split: Split, objective: SFT | DPO, device) -> dict[str, float]:
    """Metrics over the validation set, every example once, weighted as in training, on all ranks. All ranks."""
    count = min(len(split), recipe.eval_iters * recipe.global_batch_size or len(split))
    indices = np.arange(count)
    sums = torch.zeros(len(objective.sums), dtype=torch.float64, device=device)
    totals = objective.totals(split, indices)
    engine.eval()
    for part in batches.my_share(indices, split.lengths, recipe, dist.get_rank(), dist.get_world_size()):
        sums += objective.loss(split.micro_batch(part).to(device), totals)[1]
    engine.train()
    return _reduce(objective, sums, totals)


@torch.no_grad()
def example_losses(recipe: Recipe, engine, split: Split, objective: SFT | DPO, step: int, device) -> list[dict]:
    """Every example of a step with its own loss, the worst first; on all ranks. All ranks."""
    indices, mine = step_share(recipe, split, step)
    if step == 1:  # the run's largest micro-batch ran with it, with weight 0: a loss that is not finite spoils the step even so
        mine = [*mine, np.array(_largest(recipe, split))]
    engine.eval()
    losses = {}
    for part in mine:
        losses |= dict(zip(part.tolist(), objective.example_losses(split.micro_batch(part).to(device)).tolist(), strict=True))
    engine.train()
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, losses)
    merged = {index: loss for one in everyones for index, loss in one.items()}
    members = set(indices.tolist())
    worst_first = sorted(merged, key=lambda index: (math.isfinite(merged[index]), -merged[index]))
    return [
        {
            "index": i,
            "source": split.table[i]["source"],
            "tokens": int(split.lengths[i]),
            "loss": merged[i] if math.isfinite(merged[i]) else None,
            "weight": int(i in members),
        }
        for i in worst_first
    ]


def _largest(recipe: Recipe, split: Split) -> list[int]:
    limits = recipe.global_batch_size, recipe.max_tokens_per_gpu, dist.get_world_size(), recipe.packing
    return batches.largest_micro_batch(split.lengths, *limits)


def _reduce(objective: SFT | DPO, sums: torch.Tensor, totals: dict[str, int]) -> dict[str, float]:
    """Sums of all ranks -> metrics. Forces a device sync. All ranks."""
    dist.all_reduce(sums)
    return objective.metrics(dict(zip(objective.sums, sums.tolist(), strict=True)), totals)
