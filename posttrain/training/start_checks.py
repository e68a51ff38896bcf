"""Checks before the first step, each of which stops a wrong run and names the cause. All ranks call them, and all raise together."""

from pathlib import Path

import torch
from torch import distributed as dist

from posttrain.data.packing import MicroBatch
from posttrain.engine.build import forget_activations
from posttrain.objectives.answers import answer_sums
from posttrain.objectives.preference import DPO
from posttrain.training.state import Training

# Largest relative difference of an answer's log-prob computed twice with the same weights, kernels and batch. On CPUs there is none, see
# `start` in benchmarks/results/invariance.json
SAME_LOGPS = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
# Largest difference from precomputed log-probs, which other micro-batches round differently: nats per answer, divided by the square root of
# its tokens. Measured: at most 2e-6 and 0.012 (benchmarks/results/reference_band.json, by benchmarks/reference_band.py)
SAME_PRECOMPUTED = {torch.float32: 1e-5, torch.bfloat16: 0.05}
SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # largest relative difference of a pair's loss from its closed-form value
HOW_TO_SKIP = "--checks=off skips the checks, and is recorded in the run"


@torch.no_grad()
def forward_is_repeatable(policy, batch: MicroBatch, dtype: torch.dtype) -> float:
    """Check that the same batch gives the same log-probs twice, as it must without dropout. All ranks.

    Returns their largest relative difference; raises ValueError where that is too large, or log-probs are not finite.
    """
    first, second = (_sums(policy, batch).sum(1) for _ in range(2))
    if _largest(first.isfinite().logical_not().double()):
        raise ValueError(
            "before the first step log-probs of its first micro-batch are not finite: the weights are damaged or overflow in this dtype. "
            f"--replay_step=1 --checks=off shows which examples. {HOW_TO_SKIP}"
        )
    difference = _largest((first - second).abs() / first.abs().clamp(min=1))
    if not difference <= SAME_LOGPS[dtype]:
        names = [name for name, module in policy.module.model.named_modules() if _drops(module)]
        where = (
            f"it is on in {len(names)} modules, first {names[0]}"
            if names
            else "it is on elsewhere, or a kernel gives other numbers each time"
        )
        raise ValueError(
            f"before the first step the same batch gives log-probs that differ by {difference:.2g} (relative) from one forward pass to the "
            f"next, although the recipe says dropout 0: {where}. {HOW_TO_SKIP}"
        )
    return difference


@torch.no_grad()
def policy_equals_reference(objective: DPO, batch: MicroBatch, dtype: torch.dtype, precomputed_in: Path | None) -> float:
    """Check that policy and reference are the same before step 1: weights, log-probs, and the loss at its closed form. All ranks.

    `precomputed_in` is the folder of the reference's log-probs, if they are precomputed. Returns the largest difference of log-probs, in
    the unit of SAME_LOGPS or, for precomputed ones, SAME_PRECOMPUTED; raises ValueError where something differs.
    """
    if objective.reference is not None:
        _same_weights(objective.policy.module, objective.reference.module)
    policy, reference = objective.pairs(_sums(objective.policy, batch)), objective.reference_logps(batch)
    lengths = batch.answer_lengths
    differences = torch.stack([(mine - other).abs() for mine, other in zip(policy, reference, strict=True)], dim=1).flatten()
    if objective.reference is not None:
        difference, limit = _largest(differences / torch.stack(reference, dim=1).flatten().abs().clamp(min=1)), SAME_LOGPS[dtype]
        unit, cause = "relative", "the weights are the same, so its engine computes with other kernels"
    else:
        difference, limit = _largest(differences / lengths.sqrt()), SAME_PRECOMPUTED[dtype]
        unit, cause = "nats by the square root of an answer's tokens", f"delete {precomputed_in}, and they are computed anew"
    if not difference <= limit:
        raise ValueError(
            f"before the first step the log-probs of policy and reference differ by {difference:.3g} ({unit}; limit {limit:g}): "
            f"{cause}. {HOW_TO_SKIP}"
        )
    if objective.reference is not None:
        losses, expected = objective.example_losses(batch), objective.loss_at_start
        forget_activations()
        off = _largest((losses - expected).abs() / max(1.0, abs(expected)))
        if not off <= SAME_LOSS[dtype]:
            raise ValueError(
                f"before the first step a pair's loss differs by {off:.3g} from {expected:.6f}, its value where policy and reference "
                f"agree: the loss function is wrong. {HOW_TO_SKIP}"
            )
    return difference


def _same_weights(policy, reference) -> None:
    """Raise ValueError unless both were loaded with the same weights."""
    names = [name for name, value in policy.weights.items() if reference.weights.get(name) != value]
    if names:
        raise ValueError(
            f"the reference is another model than the policy starts from: {len(names)} of {len(policy.weights)} tensors differ, first "
            f"{names[0]}. Both are read from sft_checkpoint_path: was it written to while the run started? {HOW_TO_SKIP}"
        )


def _sums(policy, batch: MicroBatch) -> torch.Tensor:
    """Return the answer_sums of a forward pass that no backward pass follows."""
    sums = answer_sums(policy(batch), batch)
    forget_activations()
    return sums


def _drops(module: torch.nn.Module) -> bool:
    """Whether dropout is on in this module."""
    return bool(getattr(module, "attention_dropout", 0.0)) or (isinstance(module, torch.nn.Dropout) and module.p > 0)


def _largest(values: torch.Tensor) -> float:
    """Return the largest value over all ranks, infinite if one is not a number. All ranks."""
    largest = torch.zeros((), device=values.device) if not len(values) else values.float().nan_to_num(torch.inf, torch.inf).max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def check_start(training: Training) -> dict[str, float]:
    """Stop a run that would be wrong from its first step on; returns what each check measured, by name. All ranks."""
    recipe, objective, train = training.recipe, training.objective, training.data.train
    if recipe.checks == "off":
        return {}
    batch, dtype = train.micro_batch(training.share(1).micro_batches[0]).to(training.device), getattr(torch, recipe.dtype)
    measured = {}
    if not recipe.dropout:
        measured["repeated forward"] = forward_is_repeatable(objective.policy, batch, dtype)
    if isinstance(objective, DPO) and objective.has_reference and not training.engine.module.is_from_checkpoint:
        measured["policy and reference"] = policy_equals_reference(objective, batch, dtype, train.reference_folder)
    return measured
