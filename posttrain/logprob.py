"""Log-probs of given tokens from hidden states, never holding a [tokens x vocabulary] matrix.

One operator serves SFT, DPO and the reference: logits are made for a chunk of rows at a time, in forward and again in backward.
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
        return _TokenLogProbs.apply(hidden, self.weight, targets)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        normalizers = torch.empty_like(logps)
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = (hidden[rows] @ weight.t()).float()
            normalizers[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normalizers[rows]
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        return logps

    @staticmethod
    def backward(ctx, grad):
        """d logp / d logits = onehot(target) - softmax(logits), so each chunk costs one more product than in forward."""
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # bf16 would lose small chunks against the sum
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = (hidden[rows] @ weight.t()).float()
            grad_logits = (logits - normalizers[rows, None]).exp_().mul_(-grad[rows, None])
            grad_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
