"""Attention over a packed micro-batch: many examples in one row, none of which sees another.

Registered under a name in transformers' attention registry, so no model code is patched. A micro-batch is a row of segments;
segment s owns query rows, and its keys are an optional shared prefix (a DPO prompt) followed by its own rows, causally aligned to
the end. With no prefix that is plain causal attention within the example.
"""

from collections import defaultdict
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

# names in transformers' registry; transformers (5.23) takes any name with "sdpa" or "flash" in it for its own
SEGMENTS, VARLEN = "posttrain_segments", "posttrain_varlen"


class Segment(NamedTuple):
    start: int  # first row of its queries
    end: int
    prefix_start: int = 0  # rows of the prefix that its queries also see
    prefix_end: int = 0


class Group(NamedTuple):
    """S segments of about one length, padded at the end to a rectangle, so that one call attends in all of them."""

    query_rows: torch.Tensor  # (S, Lq) row of every query; padding repeats row 0
    key_rows: torch.Tensor  # (S, Lk) row of every key, prefix first
    mask: torch.Tensor | None  # (S, 1, Lq, Lk), True where a query sees a key; None: plain causal, which hides the padding too


@dataclass(frozen=True, eq=False)
class Packing:
    """How a row of T tokens falls into segments. Built once per micro-batch and handed to every layer."""

    segments: list[Segment]  # in row order, covering all rows
    cu_seqlens_q: torch.Tensor  # (segments + 1,) int32: where each segment's queries start
    cu_seqlens_k: torch.Tensor  # (segments + 1,) int32: the same for its keys, prefix included
    max_q: int
    max_k: int
    key_rows: torch.Tensor | None  # row of every key where prefixes are shared, else None: keys are the rows as they are

    @cached_property
    def groups(self) -> tuple[list[Group], torch.Tensor]:
        """The segments by length, and for each of the T rows its place in the groups' queries laid end to end."""
        device = self.cu_seqlens_q.device
        members = defaultdict(list)
        for segment in self.segments:
            prefix, own = segment.prefix_end - segment.prefix_start, segment.end - segment.start
            members[bool(prefix), _size_class(own), _size_class(prefix + own)].append(segment)
        groups, order, before = [], torch.empty(self.segments[-1].end, dtype=torch.int64), 0
        for segments in members.values():
            queries = [torch.arange(s.start, s.end) for s in segments]
            keys = [torch.cat([torch.arange(s.prefix_start, s.prefix_end), own]) for s, own in zip(segments, queries, strict=True)]
            query_rows, key_rows = pad_sequence(queries, batch_first=True), pad_sequence(keys, batch_first=True)
            mask = None
            if segments[0].prefix_end > segments[0].prefix_start:
                last_seen = torch.tensor([s.prefix_end - s.prefix_start for s in segments])[:, None] + torch.arange(query_rows.shape[1])
                mask = (torch.arange(key_rows.shape[1]) <= last_seen[:, :, None])[:, None].to(device)
            groups.append(Group(query_rows.to(device), key_rows.to(device), mask))
            for line, rows in enumerate(queries):
                start = before + line * query_rows.shape[1]
                order[rows] = torch.arange(start, start + len(rows))
            before += query_rows.numel()
        return groups, order.to(device)


def pack(segments: list[Segment]) -> Packing:
    queries = [s.end - s.start for s in segments]
    keys = [s.end - s.start + s.prefix_end - s.prefix_start for s in segments]
    key_rows = None
    if queries != keys:
        key_rows = torch.cat([torch.cat([torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)]) for s in segments])
    return Packing(segments, _offsets(queries), _offsets(keys), max(queries), max(keys), key_rows)


def to_device(packing: Packing, device: torch.device) -> Packing:
    values = {field.name: getattr(packing, field.name) for field in fields(packing)}
    return replace(packing, **{n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, torch.Tensor)})


def choose(kernels: str, device: torch.device, dtype: torch.dtype, dropout: float) -> tuple[str, str]:
    """The attention implementation's registered name, and why it was chosen."""
    if kernels == "torch":
        return SEGMENTS, "kernels=torch"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return SEGMENTS, "variable-length flash attention needs an Ampere or newer GPU"
    if dtype == torch.float32 or dropout:
        return SEGMENTS, "variable-length flash attention takes bfloat16 and no dropout"
    return VARLEN, "one kernel for all examples of a micro-batch"


@torch.compiler.disable  # a Python loop over groups: compiled, it would be compiled anew for each set of lengths
def attend_segments(module, query, key, value, attention_mask, scaling, packing, dropout=0.0, **_):
    """Scaled-dot-product attention, one call for the segments of about one length: the path for CPUs and the yardstick for the fast one.

    query (1, heads, T, D), key and value (1, kv_heads, T, D) -> (1, T, heads, D), None.
    """
    groups, order = packing.groups

    def pick(rows_of_heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:  # (S, heads, L, D)
        picked = rows_of_heads[0].transpose(0, 1).index_select(0, rows.flatten())
        return picked.unflatten(0, rows.shape).transpose(1, 2)

    outputs = []
    for group in groups:
        output = F.scaled_dot_product_attention(
            pick(query, group.query_rows),
            pick(key, group.key_rows),
            pick(value, group.key_rows),
            attn_mask=group.mask,
            dropout_p=dropout,
            is_causal=group.mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, order).unsqueeze(0), None


def attend_varlen(module, query, key, value, attention_mask, scaling, packing, **_):
    """torch's variable-length flash attention; its causal mask is aligned to the end of the keys, as shared prefixes need.

    Shapes as in attend_segments.
    """
    from torch.nn.attention.varlen import varlen_attn  # needs CUDA to import

    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if packing.key_rows is not None:
        key, value = key.index_select(0, packing.key_rows), value.index_select(0, packing.key_rows)
    output = varlen_attn(
        query,
        key,
        value,
        packing.cu_seqlens_q,
        packing.cu_seqlens_k,
        packing.max_q,
        packing.max_k,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.unsqueeze(0), None


def _size_class(length: int) -> tuple[int, int]:
    """Equal for lengths that may be padded to each other: up to 32, then in steps of a quarter."""
    length = max(length, 32)
    shift = length.bit_length() - 3
    return shift, length >> shift


def _offsets(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


AttentionInterface.register(SEGMENTS, attend_segments)
AttentionInterface.register(VARLEN, attend_varlen)
