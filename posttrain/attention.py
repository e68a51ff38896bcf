"""Attention over a packed micro-batch: many examples in one row, none of which sees another.

Registered under a name in transformers' attention registry, so no model code is patched. A micro-batch is a row of segments;
segment s owns query rows, and its keys are an optional shared prefix (a DPO prompt) followed by its own rows, causally aligned to
the end. With no prefix that is plain causal attention within the example.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

# names in transformers' registry; transformers (5.23) takes any name with "sdpa" or "flash" in it for its own
SEGMENTS, VARLEN = "posttrain_segments", "posttrain_varlen"


class Segment(NamedTuple):
    start: int  # first row of its queries
    end: int
    prefix_start: int = 0  # rows of the prefix that its queries also see
    prefix_end: int = 0


class Packing(NamedTuple):
    """How a row of T tokens falls into segments. Built once per micro-batch and handed to every layer."""

    segments: list[Segment]  # in row order, covering all rows
    cu_seqlens_q: torch.Tensor  # (segments + 1,) int32: where each segment's queries start
    cu_seqlens_k: torch.Tensor  # (segments + 1,) int32: the same for its keys, prefix included
    max_q: int
    max_k: int
    key_rows: torch.Tensor | None  # row of every key where prefixes are shared, else None: keys are the rows as they are


def pack(segments: list[Segment]) -> Packing:
    queries = [s.end - s.start for s in segments]
    keys = [s.end - s.start + s.prefix_end - s.prefix_start for s in segments]
    key_rows = None
    if queries != keys:
        key_rows = torch.cat([torch.cat([torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)]) for s in segments])
    return Packing(segments, _offsets(queries), _offsets(keys), max(queries), max(keys), key_rows)


def to_device(packing: Packing, device: torch.device) -> Packing:
    tensors = {name: value.to(device, non_blocking=True) for name, value in packing._asdict().items() if isinstance(value, torch.Tensor)}
    return packing._replace(**tensors)


def choose(kernels: str, device: torch.device, dtype: torch.dtype, dropout: float) -> tuple[str, str]:
    """The attention implementation's registered name, and why it was chosen."""
    if kernels == "torch":
        return SEGMENTS, "kernels=torch"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return SEGMENTS, "variable-length flash attention needs an Ampere or newer GPU"
    if dtype == torch.float32 or dropout:
        return SEGMENTS, "variable-length flash attention takes bfloat16 and no dropout"
    return VARLEN, "one kernel for all examples of a micro-batch"


@torch.compiler.disable  # a Python loop over examples: compiled, it would be compiled anew for each set of lengths
def attend_per_segment(module, query, key, value, attention_mask, scaling, packing, dropout=0.0, **_):
    """Scaled-dot-product attention, one call a segment: the path for CPUs and the yardstick for the fast one.

    query (1, heads, T, D), key and value (1, kv_heads, T, D) -> (1, T, heads, D), None.
    """
    outputs = []
    for start, end, prefix_start, prefix_end in packing.segments:
        k, v, mask = key[:, :, start:end], value[:, :, start:end], None
        if prefix_end > prefix_start:
            k = torch.cat([key[:, :, prefix_start:prefix_end], k], dim=2)
            v = torch.cat([value[:, :, prefix_start:prefix_end], v], dim=2)
            mask = torch.ones(end - start, k.shape[2], dtype=torch.bool, device=k.device).tril(prefix_end - prefix_start)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def attend_varlen(module, query, key, value, attention_mask, scaling, packing, **_):
    """torch's variable-length flash attention; its causal mask is aligned to the end of the keys, as shared prefixes need.

    Shapes as in attend_per_segment.
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


def _offsets(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


AttentionInterface.register(SEGMENTS, attend_per_segment)
AttentionInterface.register(VARLEN, attend_varlen)
