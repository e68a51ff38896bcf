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

from posttrain.data.packing import Packing, Segment, pack, to_device

aten = torch.ops.aten
# the name in transformers' registry; transformers (5.23) treats any name with "sdpa" or "flash" in it as its own
SEGMENTS = "posttrain_segments"
CURRENT: list[Packing] = []  # the micro-batch that the model computes, for architectures that hand no further arguments to their attention


def current_packing() -> Packing:
    """The Packing of the micro-batch that the model computes."""
    return CURRENT[0]


class Group(NamedTuple):
    """S segments of about one length, padded at the end to a rectangle, so that one call attends in all of them."""

    query_rows: torch.Tensor  # (S, Lq) row of every query; padding repeats row 0
    key_rows: torch.Tensor  # (S, Lk) row of every key, prefix first
    mask: torch.Tensor | None  # (S, 1, Lq, Lk) to add, -inf where a query sees no key; None: plain causal, which hides the padding too


def groups_of(segments: torch.Tensor, dtype: torch.dtype, device: torch.device, window: int = 0) -> tuple[list[Group], torch.Tensor]:
    """Group a Packing's segments by length; also returns, for each of the T rows, its place in the groups' queries laid end to end.

    `window`: how many keys a query sees at most, its own included; 0 for all.
    """
    with unset_fake_temporarily():  # the planner counts on tensors without values, which these must have
        return _groups_of(segments.numpy().tobytes(), dtype, device, window)  # by content, whichever tensor holds it


# every layer of policy and reference asks, in forward and in backward, before the next micro-batch comes; layers may have two windows
@lru_cache(maxsize=2)
def _groups_of(segments: bytes, dtype: torch.dtype, device: torch.device, window: int) -> tuple[list[Group], torch.Tensor]:
    table = np.frombuffer(segments, np.int64).reshape(-1, 4)
    own, prefix = table[:, 1] - table[:, 0], table[:, 3] - table[:, 2]
    members = defaultdict(list)
    for number, kind in enumerate(zip(prefix > 0, size_classes(own), size_classes(prefix + own), strict=True)):
        members[kind].append(number)
    groups, order, before = [], np.empty(table[-1, 1], np.int64), 0
    for alike in members.values():
        group, is_query = _group(table[alike], dtype, window)
        order[group.query_rows.numpy()[is_query]] = before + np.flatnonzero(is_query)
        before += is_query.size
        groups.append(Group(*(x if x is None else x.to(device) for x in group)))
    return groups, torch.from_numpy(order).to(device)


def _group(segments: np.ndarray, dtype: torch.dtype, window: int) -> tuple[Group, np.ndarray]:
    """The Group of (S, 4) segments, all with a prefix or all without, on the CPU; and (S, Lq) bool, false where a query is padding."""
    start, end, prefix_start, prefix_end = segments.T[:, :, None]  # (S, 1) each
    own, prefix = end - start, prefix_end - prefix_start
    query, key = np.arange(own.max()), np.arange((prefix + own).max())
    is_query = query < own
    query_rows = np.where(is_query, start + query, 0)
    key_rows = np.where(key < prefix, prefix_start + key, np.where(key < prefix + own, start + key - prefix, 0))
    mask = None
    if prefix.any() or 0 < window < (prefix + own).max():
        position = (prefix + query)[:, :, None]
        unseen = key > position
        if window:
            unseen |= key <= position - window
            unseen[:, :, 0] &= is_query  # padding sees a key, too, since a softmax of none is not a number
        mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(torch.from_numpy(unseen), -torch.inf)[:, None]
    return Group(torch.from_numpy(query_rows), torch.from_numpy(key_rows), mask), is_query


class Asked(NamedTuple):
    """What a layer asks of its attention, besides the scaled dot product, by the arguments that transformers (5.23) gives."""

    window: int = 0  # how many keys a query sees at most, its own included; 0 for all
    chunk: int = 0  # a query sees the keys of its own chunk of so many positions alone; 0 for all
    cap: float = 0.0  # scores are bounded to it by cap * tanh(score / cap) (Gemma 2); 0 for no bound
    sinks: torch.Tensor | None = None  # (heads,) a further score of each query, which has no value (gpt-oss)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked that a kernel for variable lengths lacks; a window it has, and chunks are segments."""
        return not self.cap and self.sinks is None


def asked_of(module, asked: dict) -> Asked:
    """Read what a layer asks: the arguments of its call to the attention function, and for chunks what kind of layer it is."""
    kinds, number = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    kind = kinds[number] if kinds and isinstance(number, int) and number < len(kinds) else None
    chunk = getattr(module.config, "attention_chunk_size", 0) if kind == "chunked_attention" else 0
    sinks = next((asked[name] for name in ("s_aux", "sinks") if asked.get(name) is not None), None)
    return Asked(asked.get("sliding_window") or 0, chunk or 0, asked.get("softcap") or 0.0, sinks)


def segments_of(packing: Packing, chunk: int) -> torch.Tensor:
    """A Packing's segments; with `chunk` cut at the multiples of so many positions, so that no row sees another chunk's."""
    return packing.segments if not chunk else in_chunks(packing, chunk).segments


@lru_cache(maxsize=1)
def in_chunks(packing: Packing, chunk: int) -> Packing:
    """The Packing in which the segments are cut at the multiples of `chunk` positions: a row sees its own chunk alone."""
    found = []
    for start, end, prefix_start, prefix_end in packing.segments.tolist():
        seen, at = prefix_end - prefix_start, start
        while at < end:
            position = seen + at - start
            first = position // chunk * chunk  # position of the chunk's first row
            until = min(end, at + first + chunk - position)
            inside = max(0, seen - first) if position < first + chunk else 0
            found.append(Segment(at, until, prefix_end - inside, prefix_end) if inside else Segment(at, until))
            at = until
    return to_device(pack(found), packing.cu_seqlens_q.device)


def attend_segments(module, query, key, value, attention_mask, scaling, packing=None, *, dropout=0.0, **asked):
    """Compute scaled-dot-product attention with one call for all segments of about one length.

    CPUs and old GPUs use it, and faster kernels are compared with it. Shapes:

    query (1, heads, T, D), key and value (1, kv_heads, T, D) -> output (1, T, heads, D), and None for the attention weights.
    """
    rule, packing = asked_of(module, asked), packing or current_packing()
    segments = segments_of(packing, rule.chunk)
    if rule.cap or (rule.sinks is not None and (dropout or query.device.type != "cpu" or value.shape[-1] != query.shape[-1])):
        return _attend_plainly(query, key, value, segments, scaling, dropout, rule), None
    if query.device.type == "cpu" and not dropout and value.shape[-1] == query.shape[-1]:
        return attend_on_cpu(query, key, value, segments, scaling, rule.window, rule.sinks)[0], None
    return _attend_anywhere(query, key, value, segments, scaling, dropout, rule.window), None


@torch.compiler.disable
def _attend_plainly(query, key, value, segments, scaling: float, dropout: float, rule: Asked) -> torch.Tensor:
    """Compute attend_segments with every score in memory, for what no kernel of torch has: scores that are bounded, and sinks."""
    groups, order = groups_of(segments, torch.float32, query.device, rule.window)
    outputs = []
    for group in groups:
        queries, keys, values = _rectangles(group, query, key, value)
        keys, values = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (keys, values))
        scores = (queries @ keys.transpose(2, 3)).float() * scaling
        scores = rule.cap * torch.tanh(scores / rule.cap) if rule.cap else scores
        if group.mask is None:
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(unseen, -torch.inf)
        else:
            scores = scores + group.mask
        if rule.sinks is not None:
            scores = torch.cat([scores, rule.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        weights = F.dropout(scores.softmax(-1)[..., : keys.shape[2]], dropout).to(values.dtype)
        outputs.append(_rows(weights @ values))
    return torch.cat(outputs).index_select(0, order).unsqueeze(0)


@torch.compiler.disable  # compiled, the loop would be specialised to the lengths of one micro-batch
def _attend_anywhere(query, key, value, segments, scaling: float, dropout: float, window: int = 0) -> torch.Tensor:
    """Compute attend_segments on any device, by torch's public function."""
    groups, order = groups_of(segments, query.dtype, query.device, window)
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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: torch.Tensor,
    scaling: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output (1, T, heads, D) and the log-normalizers (T, heads) by torch's flash attention for CPUs.

    `sinks` (heads,) are further scores of each query, which take a share of its attention and give nothing: with s the score of the sink
    and n the log-normalizer without it, the output shrinks by sigmoid(n - s), and the log-normalizer becomes logaddexp(n, s).

    It is one node in a compiled graph, whatever the lengths, and its backward pass writes every gradient once, where autograd would add up
    as many tensors of T rows as there are groups. It computes in float32: on examples of 100 tokens torch (2.13) takes three times as long
    in bfloat16, most of it in the backward pass, even on CPUs that have bfloat16.
    """
    dtype = query.dtype
    query, key, value = (_in_float32(x) for x in (query, key, value))
    groups, order = groups_of(segments, query.dtype, query.device, window)
    outputs, normalizers = [], []
    for group in groups:
        output, normalizer = aten._scaled_dot_product_flash_attention_for_cpu(
            *_rectangles(group, query, key, value), 0.0, group.mask is None, attn_mask=group.mask, scale=scaling
        )
        outputs.append(_rows(output))
        normalizers.append(_rows(normalizer))
    output, normalizer = (torch.cat(parts).index_select(0, order) for parts in (outputs, normalizers))
    if sinks is not None:
        output *= torch.sigmoid(normalizer - sinks.to(normalizer.dtype)).unsqueeze(-1)
        normalizer = torch.logaddexp(normalizer, sinks.to(normalizer.dtype))
    return output.unsqueeze(0).to(dtype), normalizer


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
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of query, key and value; `output` and `normalizers` are those with the sinks."""
    dtype = query.dtype
    grad, query, key, value, output = (_in_float32(x) for x in (grad, query, key, value, output))
    groups, order = groups_of(segments, query.dtype, query.device, window)
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
def _(query, key, value, segments, scaling, window=0, sinks=None):
    _, heads, tokens, width = query.shape
    normalizers = query.new_empty(tokens, heads, dtype=query.dtype if query.dtype == torch.float64 else torch.float32)
    return query.new_empty(1, tokens, heads, width), normalizers


@_attend_on_cpu_backward.register_fake
def _(grad, query, key, value, output, normalizers, segments, *, scaling, window):
    return tuple(x.new_empty(x.shape[2], x.shape[1], x.shape[3]).transpose(0, 1).unsqueeze(0) for x in (query, key, value))


def _keep(ctx, inputs, output) -> None:
    """Save for backward what attend_on_cpu was given and returned."""
    query, key, value, segments, ctx.scaling, ctx.window, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, segments, sinks)


def _differentiate(ctx, grad, grad_normalizers):
    """Return attend_on_cpu's gradients; that of its normalizers is not needed, since only backward reads them."""
    *saved, sinks = ctx.saved_tensors  # read once, since reading them may compute them again
    of_inputs, of_sinks = _attend_on_cpu_backward(grad, *saved, scaling=ctx.scaling, window=ctx.window), None
    if sinks is not None:  # a sink's share of each query's attention, times what that share takes away
        _, _, _, output, normalizers, _ = saved
        shares = torch.exp(sinks.to(normalizers.dtype) - normalizers)
        of_sinks = -(shares * (grad * output)[0].sum(-1)).sum(0).to(sinks.dtype)
    return *of_inputs, None, None, None, of_sinks


attend_on_cpu.register_autograd(_differentiate, setup_context=_keep)


def size_classes(lengths: np.ndarray) -> list[int]:
    """Numbers that are equal for lengths that may be padded to each other: up to 32, then in steps of a quarter."""
    lengths = np.maximum(lengths, 32)
    bits = np.frexp(lengths)[1]  # of the number: 6 for 32 to 63
    return (8 * bits + (lengths >> (bits - 3))).tolist()


AttentionInterface.register(SEGMENTS, attend_segments)
