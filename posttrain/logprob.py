"""Log-probs of given tokens from hidden states, never holding more than CHUNK_ELEMENTS logits.

One operator serves SFT, DPO and the reference. Forward makes the logits of some rows at a time; backward makes those of some columns, for
all rows, so that the gradient of a vocabulary entry comes whole from one product, which adds up in float32, and no second copy of the
weights in float32 is read and written for each piece. Where all logits are few enough, forward keeps them.
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
        """d logp / d logits = onehot(target) - softmax(logits)."""
        hidden, weight, targets, normalizers, kept = ctx.saved_tensors
        grad_hidden, grad_weight = hidden.new_zeros(hidden.shape, dtype=torch.float32), torch.zeros_like(weight)
        for columns in _chunks(weight.shape[0], len(targets)):
            logits = hidden @ weight[columns].t() if kept is None else kept
            grad_logits = (logits - normalizers[:, None]).exp_().mul_(-grad[:, None])  # in float32, as the normalizers are
            places = targets - columns.start
            is_here = (places >= 0) & (places < logits.shape[1])  # else it is another piece's; no row is picked out, which would wait
            grad_logits.scatter_add_(1, places.clamp(0, logits.shape[1] - 1)[:, None], torch.where(is_here, grad, 0.0)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden += grad_logits @ weight[columns]
            torch.mm(grad_logits.t(), hidden, out=grad_weight[columns])
        return grad_hidden.to(hidden.dtype), grad_weight, None


def _chunks(count: int, other: int) -> list[slice]:
    """Cuts `count` rows (or columns) of logits that have `other` columns (or rows)."""
    size = max(1, CHUNK_ELEMENTS // max(1, other))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
