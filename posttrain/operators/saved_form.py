"""Says what of a model in memory is saved: parameters without the padding that kernels need, and the buffers that belong to the model."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from posttrain.operators.layers import ARCHITECTURES, WHOLE

ALIGNED = 8  # with a width that is not a multiple of it rows are not aligned to the 16 bytes that GPUs load at once


def widen_feed_forward(model: PreTrainedModel) -> str | None:
    """Pad feed-forward blocks of an odd width with zeros up to a multiple of WHOLE; returns what was done, None where nothing was.

    The zeros change nothing: they add 0 to every output, and their gradient is 0. The config keeps the width that is saved.
    """
    if not is_widened(model.config):
        return None
    width = model.config.intermediate_size
    added = -width % WHOLE
    for layer in model.base_model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight = nn.Parameter(F.pad(linear.weight.detach(), (0, 0, 0, added)))
            if linear.bias is not None:
                linear.bias = nn.Parameter(F.pad(linear.bias.detach(), (0, added)))
            linear.out_features += added
        layer.mlp.down_proj.weight = nn.Parameter(F.pad(layer.mlp.down_proj.weight.detach(), (0, added)))
        layer.mlp.down_proj.in_features += added
    return f"feed-forward: width {width} is padded with zeros to {width + added} in memory only, since kernels work in tiles of {WHOLE}"


def is_widened(config: PreTrainedConfig) -> bool:
    """Whether widen_feed_forward pads a config's model."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in ARCHITECTURES and config.intermediate_size % ALIGNED != 0


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return by name the buffers that a state dict has: a router's correction bias, say, but not what is computed from the config."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


def saved_shape(name: str, shape: torch.Size, config) -> tuple[int, ...]:
    """Return a parameter's shape as it is saved, without widen_feed_forward's padding; `name` is its name in the model."""
    if not is_widened(config):
        return tuple(shape)
    if ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
        return (min(shape[0], config.intermediate_size), *shape[1:])
    if name.endswith(".mlp.down_proj.weight"):
        return (shape[0], min(shape[1], config.intermediate_size))
    return tuple(shape)


def as_saved(name: str, parameter: torch.Tensor, config) -> torch.Tensor:
    """Return a view of a parameter as it is saved, without widen_feed_forward's padding."""
    return parameter[tuple(slice(size) for size in saved_shape(name, parameter.shape, config))]


def count_as_saved(model: PreTrainedModel) -> int:
    """Count the model's parameters as they are saved, without buffers; at ZeRO-3, where a rank holds a part of each, they count whole."""
    return sum(math.prod(saved_shape(name, getattr(p, "ds_shape", p.shape), model.config)) for name, p in model.named_parameters())
