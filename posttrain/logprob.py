"""Log-probs of given tokens from hidden states, never holding more than CHUNK_ELEMENTS logits.

One operator serves SFT, DPO and the reference: logits are made for a chunk of rows at a time, in forward and again in backward; where one
chunk holds all rows, backward takes the logits of forward.
Symbols: N rows (trained positions), D hidden size, V vocabulary.
"""

import torch
from torch import nn

CHUNK_ELEMENTS = 2**26  # logits held at a time: 256 MiB in float32


class LogProbHead(nn.Linear):
    """A language-model head that can also answer "how likely is this token?".

    It replaces the class of an existing head (`head.__class__ = LogProbHead`), so parameter names, tied weights and ZeRO-3's gather
    hooks stay as they are.
    """

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (N, D), targets (N,) -> log-probs (N,) in float32; without targets the ordinary logits."""
        if targets is None:
            return super().forward(hidden)
        return token_logps(hidden, self.weight, targets)


def token_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,) in float32, and gradients for hidden and weight."""
    return _TokenLogProbs.apply(hidden, weight, targets)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        logps, kept = hidden.new_empty(len(targets), dtype=torch.float32), None
        normalizers, chunks = torch.empty_like(logps), _chunks(len(targets), weight.shape[0])
        for rows in chunks:
            logits = hidden[rows] @ weight.t()
            kept = logits if len(chunks) == 1 else None
            logps[rows] = logits.log_softmax(-1, torch.float32).gather(1, targets[rows, None]).squeeze(1)
            normalizers[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - logps[rows]
        ctx.save_for_backward(hidden, weight, targets, normalizers, kept)
        return logps

    @staticmethod
    def backward(ctx, grad):
        """d logp / d logits = onehot(target) - softmax(logits), so each chunk costs one more product than in forward."""
        hidden, weight, targets, normalizers, kept = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = hidden[rows] @ weight.t() if kept is None else kept
            grad_logits = (logits - normalizers[rows, None]).exp_().mul_(-grad[rows, None])  # in float32, as the normalizers are
            grad_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            part = grad_logits.t() @ hidden[rows]
            # in float32, since bf16 would lose small chunks against the sum
            grad_weight = part if kept is not None else part.float() if grad_weight is None else grad_weight.add_(part)
        return grad_hidden, torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype), None


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
