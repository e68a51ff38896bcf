"""Checks before the first step: each stops a wrong run with its cause. All ranks call them; all ranks raise together."""

import hashlib
import socket
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from torch import distributed as dist

from posttrain import batches
from posttrain import engine as engines
from posttrain.config import Recipe
from posttrain.data import MicroBatch, PreparedData
from posttrain.objectives import DPO, answer_lengths, answer_sums
from posttrain.ranks import gathered

# The same weights, kernels and batch give the same log-probs: relative difference of an answer's. On CPUs there is none, as `start` in
# benchmarks/results/invariance.json says
SAME_LOGPS = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
# Precomputed in other micro-batches, so rounded elsewhere: nats an answer, by the square root of its tokens. Measured: at most 2e-6
# and 0.012 (benchmarks/results/reference_band.json, by benchmarks/reference_band.py)
SAME_PRECOMPUTED = {torch.float32: 1e-5, torch.bfloat16: 0.05}
SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative; a pair's loss and its closed-form value
CODE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "numpy")
TELL = "checks=off goes on regardless, and is written into the run"


def same_on_all_ranks(what: str, parts: dict[str, str]) -> None:
    """Raise on every rank, naming ranks, hosts and the first differing part, unless all ranks hold the same hashes."""
    hosts, seen = zip(*gathered((socket.gethostname(), parts)), strict=True)
    different = [rank for rank, value in enumerate(seen) if value != seen[0]]
    if different:
        other = seen[different[0]]
        names = [name for name in {**seen[0], **other} if seen[0].get(name) != other.get(name)]
        there, here = sorted({hosts[rank] for rank in different}), hosts[0]
        where, whose = (f" (on {', '.join(there)})", f" (on {here})") if there != [here] else ("", "")
        raise ValueError(
            f"ranks {different}{where} hold another {what} than rank 0{whose}: {len(names)} of {len(seen[0])} parts differ, first "
            f"{names[0]}. The ranks did not read the same: compare the command and the files on their hosts"
        )


def same_inputs_on_all_ranks(recipe: Recipe, prepared: PreparedData) -> None:
    """Raise unless all ranks run the same code on the same recipe and data, down to the tokens of the first step."""
    train = prepared.train
    first = train.micro_batch(batches.step_examples(len(train), recipe.global_batch_size, recipe.seed, 1))
    tokens = hashlib.sha256(first.input_ids.numpy().tobytes() + first.targets.numpy().tobytes()).hexdigest()
    parts = {f"code: posttrain/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(CODE.glob("*.py"))}
    parts |= {f"package: {name}": version(name) for name in PACKAGES}
    parts |= {f"recipe: {name}": str(value) for name, value in recipe.model_dump().items()} | {"plan version": str(batches.PLAN_VERSION)}
    parts |= {"data: manifest and lengths": prepared.fingerprint, "data: tokens": tokens}
    same_on_all_ranks("code, recipe or prepared data", parts)


def hash_weights(module: torch.nn.Module) -> dict[str, str]:
    """A hash of the bytes of every tensor, by name. On the CPU, before sharding."""
    return {
        name: xxhash.xxh3_64_hexdigest(parameter.detach().contiguous().flatten().view(torch.uint8).numpy())
        for name, parameter in module.named_parameters()
    }


@torch.no_grad()
def scale_of_weights(module: torch.nn.Module) -> float:
    """The root mean square of the weights of its matrices."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() == 2]
    squares = sum(matrix.float().square().sum().double() for matrix in matrices)
    return float((squares / sum(matrix.numel() for matrix in matrices)).sqrt())


def digest(parts: dict[str, str]) -> str:
    """One hash for all."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


@torch.no_grad()
def forward_is_repeatable(policy, batch: MicroBatch, dtype: torch.dtype) -> float:
    """The same batch twice gives the same log-probs, as it must without dropout. Returns their largest relative difference."""
    first, second = (_sums(policy, batch).sum(1) for _ in range(2))
    if _largest(first.isfinite().logical_not().double()):
        raise ValueError(
            "before the first step log-probs of its first micro-batch are not finite: the weights are damaged or overflow in this dtype. "
            f"--replay_step=1 --checks=off shows which examples. {TELL}"
        )
    difference = _largest((first - second).abs() / first.abs().clamp(min=1))
    if not difference <= SAME_LOGPS[dtype]:
        names = [name for name, module in policy.module.model.named_modules() if _drops(module)]
        where = f"it is on in {len(names)} modules, first {names[0]}" if names else "the model draws it elsewhere, or a kernel is not exact"
        raise ValueError(
            f"before the first step the same batch gives log-probs that differ by {difference:.2g} (relative) from one forward pass to the "
            f"next, although the recipe says dropout 0: {where}. {TELL}"
        )
    return difference


@torch.no_grad()
def policy_equals_reference(objective: DPO, batch: MicroBatch, dtype: torch.dtype, precomputed_in: Path | None) -> float:
    """Before step 1 policy and reference are the same model: equal weights, equal log-probs, and the loss at its closed-form value.

    `precomputed_in`: the folder of the reference's log-probs, where there is one. Returns the largest difference of log-probs, in the unit
    of SAME_LOGPS or, for precomputed ones, SAME_PRECOMPUTED.
    """
    if objective.reference is not None:
        _same_weights(objective.policy.module, objective.reference.module)
    policy, reference = objective.pairs(_sums(objective.policy, batch)), objective.reference_logps(batch)
    lengths = answer_lengths(batch)
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
            f"{cause}. {TELL}"
        )
    if objective.reference is not None:
        losses, expected = objective.example_losses(batch), objective.loss_at_start
        engines.forget_activations()
        off = _largest((losses - expected).abs() / max(1.0, abs(expected)))
        if not off <= SAME_LOSS[dtype]:
            raise ValueError(
                f"before the first step a pair's loss differs by {off:.3g} from {expected:.6f}, its value where policy and reference "
                f"agree: the loss function is wrong. {TELL}"
            )
    return difference


def _same_weights(policy, reference) -> None:
    names = [name for name, value in policy.weights.items() if reference.weights.get(name) != value]
    if names:
        raise ValueError(
            f"the reference is another model than the policy starts from: {len(names)} of {len(policy.weights)} tensors differ, first "
            f"{names[0]}. Both are read from sft_checkpoint_path: was it written to while the run started? {TELL}"
        )


def _sums(policy, batch: MicroBatch) -> torch.Tensor:
    sums = answer_sums(policy(batch), batch)
    engines.forget_activations()
    return sums


def _drops(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "attention_dropout", 0.0)) or (isinstance(module, torch.nn.Dropout) and module.p > 0)


def _largest(values: torch.Tensor) -> float:
    """The largest value over all ranks; infinite where one is not a number. All ranks."""
    largest = torch.zeros((), device=values.device) if not len(values) else values.float().nan_to_num(torch.inf, torch.inf).max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()
