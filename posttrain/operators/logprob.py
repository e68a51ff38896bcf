"""Computes log-probs of given tokens from hidden states without ever holding more than a piece of the logits.

SFT, DPO and the reference share this operator. Forward computes logits for some rows at a time. Backward computes them for some columns
at a time, for all rows: so the gradient of a vocabulary entry comes from one product, which adds up in float32, and no float32 copy of the
head's gradient is read and written again for each piece. Where all logits together are few enough, forward keeps them for backward.
Symbols: N rows (trained positions), D hidden size, V vocabulary.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from posttrain.operators.layers import WHOLE, distances, workable
from posttrain.operators.proof import tried

PIECE = 2**26  # logits held at a time: 256 MiB in float32
# the same on GPUs with much memory, where so large products are nearer to their peak, and fewer are added up, and a model that leaves room
LARGE_PIECE, MUCH_MEMORY, LITTLE_OF_IT = 2**28, 70e9, 1 / 16
TRIED = 2**14  # logits held at a time in the comparison with the plain way, so that there are several pieces to add up
SAME = 0.02  # largest relative difference in bfloat16 at which two ways of computing count as the same


class Way(NamedTuple):
    """A way to compute log-probs."""

    compiled: bool = False  # what is not a matrix product becomes one kernel, which writes no logits in float32
    adds_products: bool = False  # the product of a piece adds itself to those before it, in float32, as GPUs can (cuBLAS)
    piece: int = PIECE  # logits held at a time


PLAIN = Way()


def way_on_gpu(memory: float, weights: float) -> Way:
    """Return the way that a GPU of `memory` bytes is meant to take with a model whose weights are `weights` bytes."""
    has_room = memory >= MUCH_MEMORY and weights <= LITTLE_OF_IT * memory
    return Way(compiled=True, adds_products=True, piece=LARGE_PIECE if has_room else PIECE)


class LogProbHead(nn.Linear):
    """A language-model head that can also answer "how likely is this token?".

    It replaces the class of an existing head (`head.__class__ = LogProbHead`), so parameter names, tied weights and ZeRO-3's gather
    hooks stay as they are.
    """

    way = PLAIN
    scale = 1.0  # by which the logits are multiplied (Cohere, Granite)
    cap = 0.0  # to which they are bounded after that, by cap * tanh(logit / cap) (Gemma 2); 0 for no bound

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Return the float32 log-probs (N,) of `targets` (N,) for hidden states (N, D).

        Without targets, as transformers calls it, these are the logits (N, V) before scale and bound.
        """
        if targets is None:
            return super().forward(hidden)
        return token_logps(hidden, self.weight, targets, self.way, self.bias, self.scale, self.cap)

    def choose(self, kernels: str, device: torch.device, weights: float) -> str:
        """Take the fastest way that is right on `device`, beside a model whose weights are `weights` bytes.

        Returns what was chosen and why, for the first screen.
        """
        if kernels == "torch":
            return "in pieces, never all logits at once (kernels=torch)"
        if device.type != "cuda":
            return "in pieces, never all logits at once (compiled on GPUs only)"
        best, passed_over = way_on_gpu(torch.cuda.get_device_properties(device).total_memory, weights), ""
        for way in (best, best._replace(adds_products=False)):
            difference, why_not = tried(lambda way=way: disagreement(way._replace(piece=TRIED), device, self.weight.dtype), SAME)
            if difference is not None:
                self.way = way
                return f"in pieces of 2^{way.piece.bit_length() - 1} logits, compiled ({difference:.1e} from plain ones{passed_over})"
            passed_over = f"; products not added up by themselves: {why_not}"
        return f"in pieces, never all logits at once (not compiled: {why_not})"


def token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    way: Way = PLAIN,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    cap: float = 0.0,
) -> torch.Tensor:
    """Return the float32 log-probs (N,) of `targets` (N,), given hidden (N, D) and the head's weight (V, D) and bias (V,).

    They are differentiable in these. `scale` and `cap` are those of LogProbHead.
    """
    if len(targets) < 2:  # torch.compile would compile anew for a single row
        way = way._replace(compiled=False)
    if scale != 1.0:  # of the few states in place of the many logits
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    return _TokenLogProbs.apply(hidden, weight, targets, way, bias, cap)


class _TokenLogProbs(torch.autograd.Function):
    """Computes token_logps in pieces, forward by rows and backward by columns."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, way, bias, cap):
        logps, kept = hidden.new_empty(len(targets), dtype=torch.float32), None
        normalizers, chunks = torch.empty_like(logps), pieces(len(targets), weight.shape[0], way.piece)
        of_rows = compiled_parts()[0] if way.compiled else _logps_of_rows
        all_weights = workable(weight)
        for rows in chunks:
            logits = _finished(workable(hidden[rows]) @ all_weights.t(), bias, cap)
            kept = logits if len(chunks) == 1 else None
            logps[rows], normalizers[rows] = of_rows(logits, targets[rows])
        ctx.save_for_backward(hidden, weight, targets, normalizers, kept, bias)
        ctx.way, ctx.cap = way, cap
        return logps

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, normalizers, kept, bias = ctx.saved_tensors
        grad = grad.contiguous()  # the gradient of a sum is one number expanded, for which torch.compile would compile anew
        states, grad_hidden = workable(hidden), hidden.new_zeros(hidden.shape, dtype=torch.float32)
        grad_weight, grad_bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        gradient = compiled_parts()[1] if ctx.way.compiled else _gradient_of_columns
        for columns in pieces(weight.shape[0], len(targets), ctx.way.piece) if kept is None else [slice(0, weight.shape[0])]:
            of_columns = workable(weight[columns])
            logits = _finished(states @ of_columns.t(), None if bias is None else bias[columns], ctx.cap) if kept is None else kept
            grad_logits = gradient(logits, normalizers, grad, targets - columns.start)
            if ctx.cap:  # the derivative of cap * tanh(x / cap), by its own value
                grad_logits = grad_logits * (1 - (logits / ctx.cap) ** 2)
            if grad_bias is not None:
                grad_bias[columns] = grad_logits.sum(0, dtype=torch.float32).to(grad_bias.dtype)
            if ctx.way.adds_products and grad_logits.dtype != torch.float32:
                torch.addmm(grad_hidden, grad_logits, of_columns, out_dtype=torch.float32, out=grad_hidden)
            else:
                grad_hidden += grad_logits @ of_columns
            if states.dtype == weight.dtype:
                torch.mm(grad_logits.t(), states, out=grad_weight[columns])
            else:
                grad_weight[columns] = grad_logits.t() @ states
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, grad_bias, None


def _finished(logits: torch.Tensor, bias: torch.Tensor | None, cap: float) -> torch.Tensor:
    """Return a product's logits with the head's bias, and bounded to `cap`; in place."""
    if bias is not None:
        logits += bias
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def logps_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the float32 log-probs (N,) of `targets` (N,), given all logits (N, V)."""
    return logits.log_softmax(-1, torch.float32).gather(1, targets[:, None]).squeeze(1)


def _logps_of_rows(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets' log-probs and the logarithms of the normalizers, each (rows,), in float32."""
    logps = logps_of(logits, targets)
    return logps, logits.gather(1, targets[:, None]).squeeze(1) - logps


def _gradient_of_columns(logits: torch.Tensor, normalizers: torch.Tensor, grad: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return d logp / d logits = onehot(target) - softmax(logits), times `grad`, for some columns.

    `places` are the targets' columns, counted from the first of these; a target in another piece lies outside.
    """
    grad_logits = (logits - normalizers[:, None]).exp_().mul_(-grad[:, None])  # in float32, as the normalizers are
    is_here = (places >= 0) & (places < logits.shape[1])  # a mask, since picking rows out would wait for the device
    grad_logits.scatter_add_(1, places.clamp(0, logits.shape[1] - 1)[:, None], torch.where(is_here, grad, 0.0)[:, None])
    return grad_logits.to(logits.dtype)


def _logps_in_one_pass(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what _logps_of_rows does, in operations that torch.compile fuses into one kernel, which writes no logits in float32."""
    normalizers = logits.float().logsumexp(-1)
    return logits.gather(1, targets[:, None]).squeeze(1) - normalizers, normalizers


def _gradient_in_one_pass(logits: torch.Tensor, normalizers: torch.Tensor, grad: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Do what _gradient_of_columns does, in operations that torch.compile fuses."""
    is_target = torch.arange(logits.shape[1], device=logits.device) == places[:, None]
    return ((is_target.float() - (logits - normalizers[:, None]).exp()) * grad[:, None]).to(logits.dtype)


@cache
def compiled_parts() -> tuple:
    """Return the two functions above, compiled for any number of rows and columns."""
    return tuple(torch.compile(function, dynamic=True) for function in (_logps_in_one_pass, _gradient_in_one_pass))


def disagreement(way: Way, device: torch.device, dtype: torch.dtype, rows: int = 37, width: int = 64, vocabulary: int = 1531) -> float:
    """Return the largest relative difference between log-probs and gradients of a way and of the plain one, on random inputs."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=draw).to(device, dtype).requires_grad_() for n in (rows, vocabulary))
    targets = torch.randint(vocabulary, (rows,), generator=draw).to(device)
    grad = torch.randn(rows, generator=draw).to(device)
    outcomes = []
    for one in (PLAIN, way):
        logps = token_logps(hidden, weight, targets, one)
        outcomes.append([logps.detach(), *torch.autograd.grad(logps, (hidden, weight), grad)])
    return distances(*outcomes).max().item()


def pieces(count: int, other: int, elements: int) -> list[slice]:
    """Cut `count` rows (or columns) of logits, with `other` columns (or rows), into pieces of at most so many elements."""
    size = max(1, elements // max(1, other))
    if size > WHOLE:
        size -= size % WHOLE
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
