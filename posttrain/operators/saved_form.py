"""The form in which a model is saved, where memory holds another: feed-forward blocks are widened for the kernels' sake."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from posttrain.operators.layers import ARCHITECTURES, WHOLE

ALIGNED = 8  # widths that are not a multiple of it have rows that begin off the borders at which GPUs load 16 bytes


def widen_feed_forward(model: PreTrainedModel) -> str | None:
    """Feed-forward blocks of an odd width get zeros in memory up to a multiple of WHOLE; returns what was done, if anything.

    They change nothing: what they add to an output is 0, and so is their gradient. The config keeps the width of the model as it is saved.
    """
    width = getattr(model.config, "intermediate_size", 0)
    if type(model).__name__ not in ARCHITECTURES or width % ALIGNED == 0:
        return None
    added = -width % WHOLE
    for layer in model.base_model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight = nn.Parameter(F.pad(linear.weight.detach(), (0, 0, 0, added)))
            if linear.bias is not None:
                linear.bias = nn.Parameter(F.pad(linear.bias.detach(), (0, added)))
            linear.out_features += added
        layer.mlp.down_proj.weight = nn.Parameter(F.pad(layer.mlp.down_proj.weight.detach(), (0, added)))
        layer.mlp.down_proj.in_features += added
    return f"feed-forward: {width} wide, in memory {width + added} (zeros, in no saved model), kernels are made for multiples of {WHOLE}"


def saved_shape(name: str, shape: torch.Size, config) -> tuple[int, ...]:
    """Of a parameter, by its name in the model, as a model folder holds it: without what widen_feed_forward added."""
    if ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
        return (min(shape[0], config.intermediate_size), *shape[1:])
    if name.endswith(".mlp.down_proj.weight"):
        return (shape[0], min(shape[1], config.intermediate_size))
    return tuple(shape)


def as_saved(name: str, parameter: torch.Tensor, config) -> torch.Tensor:
    return parameter[tuple(slice(size) for size in saved_shape(name, parameter.shape, config))]


def count_as_saved(model: PreTrainedModel) -> int:
    """Parameters of the model's folder, whole where ZeRO-3 holds a part of each."""
    return sum(math.prod(saved_shape(name, getattr(p, "ds_shape", p.shape), model.config)) for name, p in model.named_parameters())
