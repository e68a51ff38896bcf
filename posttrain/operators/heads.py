"""Reads from a model's config how its head makes logits of what a linear layer gives, and how wide the heads of its attention are."""

from typing import NamedTuple

from transformers import PreTrainedConfig

# keys of config.json (transformers 5.23)
MULTIPLIED, DIVIDED = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
BOUNDED = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES = ("hyperclovax",)  # model types that multiply by what all others divide by


class Heads(NamedTuple):
    """The heads of a layer's attention."""

    queries: int
    keys: int  # and values; fewer than queries where several share them
    width: int


def heads_of(config: PreTrainedConfig) -> list[Heads]:
    """Return the heads of each layer, which may differ (Gemma 4); of a model without any (Mamba) an empty list."""
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    if not getattr(config, "num_attention_heads", None):
        return []
    found = []
    for layer in layers:
        queries = layer.num_attention_heads
        width = getattr(layer, "head_dim", None) or config.hidden_size // queries
        found.append(Heads(queries, getattr(layer, "num_key_value_heads", None) or queries, width))
    return found


def scale_and_cap(config: PreTrainedConfig) -> tuple[float, float]:
    """Return the factor of a model's logits, and to what they are bounded after that; 0 where they are not."""
    scale, cap = 1.0, 0.0
    for name in MULTIPLIED:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVIDED:
        value = getattr(config, name, None) or 1.0
        scale *= value if config.model_type in MULTIPLIES else 1 / value
    for name in BOUNDED:
        cap = getattr(config, name, None) or cap
    return float(scale), float(cap)
