"""Attention over a packed micro-batch by torch's variable-length flash attention, for GPUs."""

import inspect

from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from posttrain.operators.attention_segments import asked_of, current_packing, in_chunks

# the name in transformers' registry; transformers (5.23) treats any name with "sdpa" or "flash" in it as its own
VARLEN = "posttrain_varlen"
# torch 2.13 must be told of grouped key and value heads; 2.11 sees them by itself
ASKS_FOR_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend_varlen(module, query, key, value, attention_mask, scaling, packing=None, **asked):
    """Compute attention of all segments by one call; causal mask and window are aligned to the end of the keys, as shared prefixes need.

    Shapes are those of attend_segments. Raises ValueError where a layer asks for what the kernel lacks.
    """
    rule, packing = asked_of(module, asked), packing or current_packing()
    if not rule.is_plain:
        raise ValueError("its attention has sinks or bounds its scores, which variable-length flash attention does not")
    packing = in_chunks(packing, rule.chunk) if rule.chunk else packing
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
        window_size=(rule.window - 1, 0),
        **({"enable_gqa": True} if ASKS_FOR_GROUPED_HEADS and query.shape[1] != key.shape[1] else {}),
    )
    return output.unsqueeze(0), None


AttentionInterface.register(VARLEN, attend_varlen)
