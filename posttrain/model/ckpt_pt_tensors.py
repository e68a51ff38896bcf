"""Which tensors a ckpt.pt holds for a model of given sizes, and how they become those of transformers' Llama and back.

Most differ in their name only. The attention's projections also differ in form: a ckpt.pt holds query, key and value in one matrix
(`fused`), or key and value in one, and it rotates neighbouring rows of a head where transformers rotates its first half against its second.
"""

from typing import NamedTuple

import torch

LAYER_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ffn.w_gate": "mlp.gate_proj",
    "ffn.w_value": "mlp.up_proj",
    "ffn.w_out": "mlp.down_proj",
}
TOP_NAMES = {"token_embeddings": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}


class Sizes(NamedTuple):
    """The sizes of a model, by their names in model_args; `fused` is for the form of its attention tensors."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    num_key_value_heads: int
    d_ff: int
    fused: bool  # query, key and value in one c_attn; else c_q, and key and value in c_kv

    @property
    def head(self) -> int:
        """How many numbers an attention head's query or key has."""
        return self.n_embd // self.n_head

    @property
    def kv_rows(self) -> int:
        """How many rows the key's projection has, and as many the value's."""
        return self.num_key_value_heads * self.n_embd // self.n_head


def expected_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a ckpt.pt of these sizes must hold, by its name there."""
    dim, ff, vocab = sizes.n_embd, sizes.d_ff, sizes.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"token_embeddings": (vocab, dim), "lm_head": (vocab, dim), "final_norm": (dim,)}
    for i in range(sizes.n_layer):
        shapes |= {f"blocks.{i}.norm1": (dim,), f"blocks.{i}.norm2": (dim,), f"blocks.{i}.attn.c_proj": (dim, dim)}
        attention = {"c_attn": (3 * dim, dim)} if sizes.fused else {"c_q": (dim, dim), "c_kv": (2 * sizes.kv_rows, dim)}
        shapes |= {f"blocks.{i}.attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"blocks.{i}.ffn.w_gate": (ff, dim), f"blocks.{i}.ffn.w_value": (ff, dim), f"blocks.{i}.ffn.w_out": (dim, ff)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def to_llama(state: dict[str, torch.Tensor], sizes: Sizes) -> dict[str, torch.Tensor]:
    """Return the state dict of LlamaForCausalLM for that of a ckpt.pt. Tensors that are the same in both are not copied."""
    out = {theirs: state[ours] for ours, theirs in _same_tensors(sizes.n_layer).items()}
    for i in range(sizes.n_layer):
        names = ["c_attn"] if sizes.fused else ["c_q", "c_kv"]
        whole = torch.cat([state[f"blocks.{i}.attn.{name}.weight"] for name in names])
        q, k, v = whole.split([sizes.n_embd, sizes.kv_rows, sizes.kv_rows])
        q, k = _pairs_to_halves(q, sizes.n_head), _pairs_to_halves(k, sizes.num_key_value_heads)
        out |= {f"model.layers.{i}.self_attn.{name}_proj.weight": tensor for name, tensor in zip("qkv", (q, k, v), strict=True)}
    return out


def from_llama(weights: dict[str, torch.Tensor], sizes: Sizes) -> dict[str, torch.Tensor]:
    """Return the state dict of a ckpt.pt for that of LlamaForCausalLM: the inverse of to_llama."""
    out = {ours: weights[theirs] for ours, theirs in _same_tensors(sizes.n_layer).items()}
    for i in range(sizes.n_layer):
        q, k, v = (weights[f"model.layers.{i}.self_attn.{name}_proj.weight"] for name in "qkv")
        q, k = _halves_to_pairs(q, sizes.n_head), _halves_to_pairs(k, sizes.num_key_value_heads)
        attention = {"c_attn": torch.cat([q, k, v])} if sizes.fused else {"c_q": q, "c_kv": torch.cat([k, v])}
        out |= {f"blocks.{i}.attn.{name}.weight": tensor for name, tensor in attention.items()}
    return out


def rope_buffers(sizes: Sizes, length: int, theta: float) -> dict[str, torch.Tensor]:
    """Return the cached rotary tables that a strict load by the format's own code asks for; all layers' names share one storage."""
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, sizes.head, 2).float() / sizes.head))
    tables = {"cos_cached": angles.cos(), "sin_cached": angles.sin()}
    return {f"blocks.{i}.attn.rope.{name}": table for i in range(sizes.n_layer) for name, table in tables.items()}


def _same_tensors(n_layer: int) -> dict[str, str]:
    """Map the ckpt.pt name to the Llama name of every tensor that is the same in both."""
    layers = {f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for i in range(n_layer) for a, b in LAYER_NAMES.items()}
    return {f"{a}.weight": f"{b}.weight" for a, b in (TOP_NAMES | layers).items()}


def _pairs_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows (heads × head, D): rotary pairs (0, 1), (2, 3) … of each head become (0, head/2), (1, head/2 + 1) …"""
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _halves_to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo _pairs_to_halves."""
    return rows.view(heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
