"""Checks before the first step: each stops a wrong run with its cause. All ranks call them; all ranks raise together."""

import hashlib

import torch
from torch import distributed as dist

from posttrain.data import MicroBatch
from posttrain.objectives import DPO, pair_logps

# nats an answer's token on average; the same weights, kernels and batch give the same numbers up to rounding
SAME_LOGPS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def same_on_all_ranks(what: str, fingerprint: str) -> None:
    """Raise on every rank unless all ranks hold the same fingerprint."""
    seen: list = [None] * dist.get_world_size()
    dist.all_gather_object(seen, fingerprint)
    different = [rank for rank, value in enumerate(seen) if value != seen[0]]
    if different:
        raise ValueError(f"ranks {different} hold another {what} than rank 0: the hosts do not read the same files")


def weights_fingerprint(module: torch.nn.Module) -> str:
    """A hash of the weights that notices any changed tensor, without copying them: sums and absolute sums."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        sums = torch.stack([parameter.detach().double().sum(), parameter.detach().double().abs().sum()])
        digest.update(name.encode() + str(sums.tolist()).encode())
    return digest.hexdigest()


@torch.no_grad()
def policy_equals_reference(objective: DPO, batch: MicroBatch, dtype: torch.dtype) -> None:
    """Before step 1 policy and reference are the same model, so each answer's log-probs agree and the loss is ln 2."""
    policy, reference = pair_logps(objective.policy(batch), batch), objective.reference_logps(batch)
    tokens = torch.bincount(batch.answers, minlength=batch.num_answers).clamp(min=1)
    difference = torch.zeros((), device=batch.rows.device)
    for mine, other, count in ((policy.chosen, reference.chosen, tokens[0::2]), (policy.rejected, reference.rejected, tokens[1::2])):
        if len(mine):
            difference = torch.maximum(difference, ((mine - other).abs() / count).max())
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    if not difference.item() <= SAME_LOGPS[dtype]:
        raise ValueError(
            f"before the first step policy and reference differ by {difference.item():.3g} nats a token (limit {SAME_LOGPS[dtype]}), so "
            "the first loss is not ln 2: the reference is another checkpoint, or dropout is on"
        )
