"""Reads from a model's config how its head makes logits of what a linear layer gives: what they are multiplied by, and bounded to."""

from transformers import PreTrainedConfig

# keys of config.json (transformers 5.23)
MULTIPLIED, DIVIDED = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
BOUNDED = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES = ("hyperclovax",)  # model types that multiply by what all others divide by


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
