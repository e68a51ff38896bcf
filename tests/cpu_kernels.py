"""Flash attention, and a product, for CPUs, computed plainly: behind torch's operators, where FA3 and FA4 are, so GPUs' code runs here.

It refuses what a kernel would read past, or leave out, in silence: lengths that do not fit the rows, and offsets of another type.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flash_attention() -> Iterator[None]:
    """Give torch's flash attention a forward and a backward pass on CPUs as long as the context lasts."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield
    finally:
        library._destroy()


@contextmanager
def adding_products() -> Iterator[None]:
    """Give CPUs the product of bfloat16 matrices that adds itself to a float32 matrix, which GPUs have, as long as the context lasts."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("addmm.dtype_out", _add_product, "CPU")
        yield
    finally:
        library._destroy()


def _add_product(added, left, right, out_dtype, *, beta=1, alpha=1, out):
    """Compute out = beta * added + alpha * left @ right, in `out_dtype`; `out` may be `added`."""
    assert left.dtype == right.dtype and added.dtype == out.dtype == out_dtype
    return out.copy_(beta * added + alpha * (left.to(out_dtype) @ right.to(out_dtype)))


def _forward(query, key, value, offsets_q, offsets_k, max_q, max_k, dropout, is_causal, return_debug_mask, **settings):
    """Return the output (T, heads, D), the log-normalizers (heads, T) in float32, and three tensors that nobody reads."""
    _refuse_what_does_not_fit(query, key, value, offsets_q, offsets_k, max_q, max_k, dropout)
    output, normalizers = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for rows, keys in _segments(offsets_q, offsets_k):
        scores = _scores(query[rows], key[keys], is_causal, settings)
        output[rows] = (scores.softmax(-1) @ _expanded(value[keys], query)).transpose(0, 1).to(query.dtype)
        normalizers[:, rows] = scores.logsumexp(-1)
    return output, normalizers, *(torch.zeros(2, dtype=torch.uint64) for _ in range(2)), query.new_empty(0)


def _backward(
    grad, query, key, value, output, normalizers, offsets_q, offsets_k, max_q, max_k, dropout, is_causal, seed, unused, **settings
):
    """Return the gradients of query, key and value, from the log-normalizers, as flash attention does."""
    _refuse_what_does_not_fit(query, key, value, offsets_q, offsets_k, max_q, max_k, dropout)
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for rows, keys in _segments(offsets_q, offsets_k):
        of_output, own, seen = (x.float().transpose(0, 1) for x in (grad[rows], output[rows], query[rows]))
        weights = (_scores(query[rows], key[keys], is_causal, settings) - normalizers[:, rows, None]).exp()
        of_weights = of_output @ _expanded(value[keys], query).transpose(1, 2)
        of_scores = settings["scale"] * weights * (of_weights - (of_output * own).sum(-1, keepdim=True))
        grad_query[rows] = (of_scores @ _expanded(key[keys], query)).transpose(0, 1).to(query.dtype)
        for grads, of_heads in ((grad_key, of_scores.transpose(1, 2) @ seen), (grad_value, weights.transpose(1, 2) @ of_output)):
            # each head of the keys belongs to as many neighbouring heads of the queries
            grads[keys] = of_heads.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1).to(key.dtype)
    return grad_query, grad_key, grad_value


def _refuse_what_does_not_fit(query, key, value, offsets_q, offsets_k, max_q: int, max_k: int, dropout: float) -> None:
    assert not dropout and key.shape == value.shape and query.shape[1] % key.shape[1] == 0 and len(offsets_q) == len(offsets_k)
    for rows, offsets, most in ((query, offsets_q, max_q), (key, offsets_k, max_k)):
        assert rows.stride(-1) == 1 and offsets.dtype == torch.int32 and offsets[0] == 0
        assert (int(offsets[-1]), int(offsets.diff().max())) == (len(rows), most)


def _segments(offsets_q: torch.Tensor, offsets_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield each segment's rows of the queries and of the keys."""
    ends = zip(offsets_q.tolist(), offsets_q.tolist()[1:], offsets_k.tolist(), offsets_k.tolist()[1:], strict=False)
    return ((slice(start, end), slice(first, last)) for start, end, first, last in ends)


def _expanded(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return rows of keys or values (L, kv_heads, D) as (heads, L, D) in float32."""
    return x.float().transpose(0, 1).repeat_interleave(query.shape[1] // x.shape[1], 0)


def _scores(query: torch.Tensor, key: torch.Tensor, is_causal: bool, settings: dict) -> torch.Tensor:
    """Return a segment's scaled scores (heads, Lq, Lk), -inf where a query does not see the key: the last query is beside the last key."""
    left, right = settings["window_size_left"], 0 if is_causal else settings["window_size_right"]
    ahead = torch.arange(len(key)) - torch.arange(len(key) - len(query), len(key))[:, None]
    unseen = (ahead > right if right >= 0 else ahead > len(key)) | (ahead < -left if left >= 0 else ahead < -len(key))
    scores = settings["scale"] * query.float().transpose(0, 1) @ _expanded(key, query).transpose(1, 2)
    return scores.masked_fill(unseen, -torch.inf)
