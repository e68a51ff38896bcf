"""Attention over a packed micro-batch: many examples in one row, none of which sees another.

Registered under a name in transformers' attention registry, so no model code is patched. A micro-batch is a row of segments;
segment s owns query rows, and its keys are an optional shared prefix (a DPO prompt) followed by its own rows, causally aligned to
the end. With no prefix that is plain causal attention within the example.
"""

from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface

aten = torch.ops.aten
# the name in transformers' registry; transformers (5.23) treats any name with "sdpa" or "flash" in it as its own
SEGMENTS = "posttrain_segments"


class Group(NamedTuple):
    """S segments of about one length, padded at the end to a rectangle, so that one call attends in all of them."""

    query_rows: torch.Tensor  # (S, Lq) row of every query; padding repeats row 0
    key_rows: torch.Tensor  # (S, Lk) row of every key, prefix first
    mask: torch.Tensor | None  # (S, 1, Lq, Lk) to add, -inf where a query sees no key; None: plain causal, which hides the padding too


def groups_of(segments: torch.Tensor, dtype: torch.dtype, device: torch.device) -> tuple[list[Group], torch.Tensor]:
    """Group a Packing's segments by length; also returns, for each of the T rows, its place in the groups' queries laid end to end."""
    with unset_fake_temporarily():  # the planner counts on tensors without values, which these must have
        return _groups_of(segments.numpy().tobytes(), dtype, device)  # by content, whichever tensor holds it


@lru_cache(maxsize=1)  # every layer of policy and reference asks, in forward and in backward, before the next micro-batch comes
def _groups_of(segments: bytes, dtype: torch.dtype, device: torch.device) -> tuple[list[Group], torch.Tensor]:
    table = np.frombuffer(segments, np.int64).reshape(-1, 4)
    own, prefix = table[:, 1] - table[:, 0], table[:, 3] - table[:, 2]
    members = defaultdict(list)
    for number, kind in enumerate(zip(prefix > 0, _size_classes(own), _size_classes(prefix + own), strict=True)):
        members[kind].append(number)
    groups, order, before = [], np.empty(table[-1, 1], np.int64), 0
    for alike in members.values():
        group, is_query = _group(table[alike], dtype)
        order[group.query_rows.numpy()[is_query]] = before + np.flatnonzero(is_query)
        before += is_query.size
        groups.append(Group(*(x if x is None else x.to(device) for x in group)))
    return groups, torch.from_numpy(order).to(device)


def _group(segments: np.ndarray, dtype: torch.dtype) -> tuple[Group, np.ndarray]:
    """The Group of (S, 4) segments, all with a prefix or all without, on the CPU; and (S, Lq) bool, false where a query is padding."""
    start, end, prefix_start, prefix_end = segments.T[:, :, None]  # (S, 1) each
    own, prefix = end - start, prefix_end - prefix_start
    query, key = np.arange(own.max()), np.arange((prefix + own).max())
    is_query = query < own
    query_rows = np.where(is_query, start + query, 0)
    key_rows = np.where(key < prefix, prefix_start + key, np.where(key < prefix + own, start + key - prefix, 0))
    mask = None
    if prefix.any():
        unseen = torch.from_numpy(key > (prefix + query)[:, :, None])[:, None]
        mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
    return Group(torch.from_numpy(query_rows), torch.from_numpy(key_rows), mask), is_query


def refuse_other_attention(asked: dict) -> None:
    """Raise ValueError where a model's layer asks its attention function for more than scaled-dot-product attention.

    `asked` are the function's further arguments: Gemma2 gives softcap, GptOss s_aux, its sinks (transformers 5.23).
    """
    if unknown := [name for name in ("softcap", "s_aux") if asked.get(name) is not None]:
        raise ValueError(f"its attention asks for {unknown[0]}, which packed attention does not compute")


def attend_segments(module, query, key, value, attention_mask, scaling, packing, *, dropout=0.0, **asked):
    """Compute scaled-dot-product attention with one call for all segments of about one length.

    CPUs and old GPUs use it, and faster kernels are compared with it. Shapes:

    query (1, heads, T, D), key and value (1, kv_heads, T, D) -> output (1, T, heads, D), and None for the attention weights.
    """
    refuse_other_attention(asked)
    if query.device.type == "cpu" and not dropout and value.shape[-1] == query.shape[-1]:
        return attend_on_cpu(query, key, value, packing.segments, scaling)[0], None
    return _attend_anywhere(query, key, value, packing.segments, scaling, dropout), None


@torch.compiler.disable  # compiled, the loop would be specialised to the lengths of one micro-batch
def _attend_anywhere(query, key, value, segments, scaling: float, dropout: float) -> torch.Tensor:
    """Compute attend_segments on any device, by torch's public function."""
    groups, order = groups_of(segments, query.dtype, query.device)
    shared = query.shape[1] // key.shape[1]  # queries' heads to one of the keys'
    outputs = []
    for group in groups:
        rectangles = _rectangles(group, query, key, value)
        # only flash attention takes grouped heads, and it takes neither float32 nor masks: for all else torch (2.13) would compute every
        # score of every head at once, O(L^2) bytes, where its memory-efficient kernel takes heads that are expanded
        is_expanded = shared > 1 and (query.dtype == torch.float32 or group.mask is not None)
        if is_expanded:
            rectangles[1:] = (x.repeat_interleave(shared, 1) for x in rectangles[1:])
        output = F.scaled_dot_product_attention(
            *rectangles,
            attn_mask=group.mask,
            dropout_p=dropout,
            is_causal=group.mask is None,
            scale=scaling,
            enable_gqa=shared > 1 and not is_expanded,
        )
        outputs.append(_rows(output))
    return torch.cat(outputs).index_select(0, order).unsqueeze(0)


@torch.library.custom_op("posttrain::attend_on_cpu", mutates_args=())
def attend_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output (1, T, heads, D) and the log-normalizers (T, heads) by torch's flash attention for CPUs.

    It is one node in a compiled graph, whatever the lengths, and its backward pass writes every gradient once, where autograd would add up
    as many tensors of T rows as there are groups. It computes in float32: on examples of 100 tokens torch (2.13) takes three times as long
    in bfloat16, most of it in the backward pass, even on CPUs that have bfloat16.
    """
    dtype = query.dtype
    query, key, value = (_in_float32(x) for x in (query, key, value))
    groups, order = groups_of(segments, query.dtype, query.device)
    outputs, normalizers = [], []
    for group in groups:
        output, normalizer = aten._scaled_dot_product_flash_attention_for_cpu(
            *_rectangles(group, query, key, value), 0.0, group.mask is None, attn_mask=group.mask, scale=scaling
        )
        outputs.append(_rows(output))
        normalizers.append(_rows(normalizer))
    return torch.cat(outputs).index_select(0, order).unsqueeze(0).to(dtype), torch.cat(normalizers).index_select(0, order)


@torch.library.custom_op("posttrain::attend_on_cpu_backward", mutates_args=())
def _attend_on_cpu_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    normalizers: torch.Tensor,
    segments: torch.Tensor,
    *,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = query.dtype
    grad, query, key, value, output = (_in_float32(x) for x in (grad, query, key, value, output))
    groups, order = groups_of(segments, query.dtype, query.device)
    sizes = [group.query_rows.numel() for group in groups]
    padded = sum(sizes)
    # padding gets gradient 0, and an infinite normalizer, which makes its attention weights 0
    grads = grad.new_zeros(padded, *grad.shape[2:]).index_copy_(0, order, grad[0])
    normalizers = normalizers.new_full((padded, normalizers.shape[1]), torch.inf).index_copy_(0, order, normalizers)
    grad_queries = []
    grad_key, grad_value = (x.new_zeros(x.shape[2], x.shape[1], x.shape[3]) for x in (key, value))
    for group, grad_rows, normalizer in zip(groups, grads.split(sizes), normalizers.split(sizes), strict=True):
        shape = group.query_rows.shape
        of_query, of_key, of_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_rows.unflatten(0, shape).transpose(1, 2),
            *_rectangles(group, query, key, value),
            _rectangle(output.transpose(1, 2), group.query_rows),
            normalizer.unflatten(0, shape).transpose(1, 2).contiguous(),
            0.0,
            group.mask is None,
            attn_mask=group.mask,
            scale=scaling,
        )
        grad_queries.append(_rows(of_query))
        grad_key.index_add_(0, group.key_rows.flatten(), _rows(of_key))
        grad_value.index_add_(0, group.key_rows.flatten(), _rows(of_value))
    grad_query = torch.cat(grad_queries).index_select(0, order)
    return tuple(x.transpose(0, 1).unsqueeze(0).to(dtype) for x in (grad_query, grad_key, grad_value))


def _in_float32(x: torch.Tensor) -> torch.Tensor:
    """Return a bfloat16 tensor in float32, others as they are."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _rectangles(group: Group, query, key, value) -> list[torch.Tensor]:
    return [_rectangle(x, rows) for x, rows in ((query, group.query_rows), (key, group.key_rows), (value, group.key_rows))]


def _rectangle(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Pick a group's rows: x (1, heads, T, D), rows (S, L) -> (S, heads, L, D)."""
    return x[0].transpose(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Lay a group's rows end to end: (S, heads, L, ...) -> (S * L, heads, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


@attend_on_cpu.register_fake
def _(query, key, value, segments, scaling):
    _, heads, tokens, width = query.shape
    normalizers = query.new_empty(tokens, heads, dtype=query.dtype if query.dtype == torch.float64 else torch.float32)
    return query.new_empty(1, tokens, heads, width), normalizers


@_attend_on_cpu_backward.register_fake
def _(grad, query, key, value, output, normalizers, segments, *, scaling):
    return tuple(x.new_empty(x.shape[2], x.shape[1], x.shape[3]).transpose(0, 1).unsqueeze(0) for x in (query, key, value))


def _keep(ctx, inputs, output) -> None:
    """Save for backward what attend_on_cpu was given and returned."""
    *tensors, ctx.scaling = inputs
    query, key, value, segments = tensors
    ctx.save_for_backward(query, key, value, *output, segments)


def _differentiate(ctx, grad, grad_normalizers):
    """Return attend_on_cpu's gradients; that of its normalizers is not needed, since only backward reads them."""
    return *_attend_on_cpu_backward(grad, *ctx.saved_tensors, scaling=ctx.scaling), None, None


attend_on_cpu.register_autograd(_differentiate, setup_context=_keep)


def _size_classes(lengths: np.ndarray) -> list[int]:
    """Numbers that are equal for lengths that may be padded to each other: up to 32, then in steps of a quarter."""
    lengths = np.maximum(lengths, 32)
    bits = np.frexp(lengths)[1]  # of the number: 6 for 32 to 63
    return (8 * bits + (lengths >> (bits - 3))).tolist()


AttentionInterface.register(SEGMENTS, attend_segments)
