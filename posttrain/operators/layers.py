"""Chooses at start which kernels compute a model's layers; they are compared with transformers' own before they are used.

GPUs take liger-kernel's fused RMSNorm, rotary embedding and SwiGLU. CPUs whose bfloat16 torch (2.13) does not hand to oneDNN would multiply
it ten to sixty times slower than float32: they multiply in float32 and round to bfloat16.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.data.packing import Segment, pack, to_device
from posttrain.operators.attention_segments import SEGMENTS
from posttrain.operators.proof import tried

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
WHOLE = 128  # kernels work in tiles of this width
TRIAL_ROWS = 128  # positions of a segment in a layer's trial; attention takes float32 memory by their square where no kernel is fast
Change = Callable[[PreTrainedModel], None]  # puts other kernels into a model's layers
FARTHER = 1.5  # a changed layer's error against float32 may be this many times that of transformers' own layer
ROUNDING = 0.005  # relative error that is allowed besides
PLAIN_ROTARY: dict[str, Callable] = {}  # by module of transformers: its rotary embedding, which liger-kernel replaces for all models


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads and writes text, without its head: of one that also sees pictures the language model."""
    base = model.base_model
    part = getattr(base, "language_model", getattr(base, "model", base) if base is model else base)  # Llama 4's base is itself
    return part if part.get_output_embeddings() is None else getattr(part, "model", part.base_model)  # and its language model has the head


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers, whatever its architecture calls them. Raises ValueError where they cannot be told."""
    for part in text_model(model).modules():
        if isinstance(part, nn.ModuleList) and len(part) and all(isinstance(layer, GradientCheckpointingLayer) for layer in part):
            return part
    raise ValueError(
        f"the decoder layers of {type(model).__name__} cannot be told, so compile: True and activation_checkpointing: selective are not "
        f"possible with it; they are with {', '.join(ARCHITECTURES)}"
    )


def choose(model: PreTrainedModel, kernels: str, compiled: bool, device: torch.device) -> tuple[str, Change | None]:
    """Put the fastest kernels that are right on `device` into the model's layers.

    Returns which, and why, for the first screen; and what puts them into the same model of another rank, None where nothing has to.
    """
    if kernels == "torch":
        return "transformers' own (kernels=torch)", None
    if type(model).__name__ not in ARCHITECTURES:
        return f"transformers' own ({type(model).__name__} is not among {', '.join(ARCHITECTURES)})", None
    if multiplies_in_float32(device, model.dtype):
        what, change = "products in float32, since torch has no fast ones in bfloat16 for this CPU", _multiply_in_float32
    elif compiled:
        return "each decoder layer compiled", None
    elif device.type != "cuda":
        return "transformers' own (liger-kernel's need a GPU)", None
    elif find_spec("liger_kernel") is None:
        return "transformers' own (liger-kernel is not installed; pip install liger-kernel)", None
    else:
        what, change = f"liger-kernel {version('liger-kernel')}'s RMSNorm, rotary embedding and SwiGLU", _put_in_liger
    measured, why_not = tried(lambda: prove(model, change, device))
    if measured is None:
        return f"transformers' own (not {what}: {why_not})", None
    plain, changed = measured
    return f"{what} (relative error {changed:.1e}, transformers' own {plain:.1e}){'; compiled' if compiled else ''}", change


@cache
def multiplies_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are better computed in float32: bfloat16 on a CPU without fast instructions for it."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def workable(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in a dtype that its device multiplies fast: itself, or a float32 copy."""
    return x.float() if multiplies_in_float32(x.device, x.dtype) else x


class Float32Linear(nn.Linear):
    """A linear layer with bfloat16 weights and outputs that multiplies in float32. It replaces the class of an existing layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Float32Product.apply(x, self.weight, self.bias)


class _Float32Product(torch.autograd.Function):
    """Computes x (..., I), weight (O, I), bias (O,) or None -> (..., O); saves for backward what it was given, not the float32 copies."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x.float(), weight.float(), bias.float() if ctx.has_bias else None).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.float()
        rows = grad.flatten(0, -2)
        of_x = (grad @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (rows.t() @ x.float().flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0).to(weight.dtype) if ctx.has_bias else None


def _multiply_in_float32(model: PreTrainedModel) -> None:
    """Turn all linear layers but the head into Float32Linear."""
    for module in model.base_model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Float32Linear


def _put_in_liger(model: PreTrainedModel) -> None:
    """Put liger-kernel's layers into this model; the rotary embedding changes for all models, being looked up in the module.

    liger-kernel (0.8.5) also replaces the classes in that module. They are put back, since a model built later would be made of them.
    """
    from liger_kernel.transformers import monkey_patch

    module = _keep_plain_rotary(model)
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    which = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
    try:
        monkey_patch._apply_liger_kernel_to_instance(model, **which)
    finally:
        vars(module).update(classes)


def _keep_plain_rotary(model: PreTrainedModel) -> ModuleType:
    """Return the model's module of transformers, whose own rotary embedding is kept and put back into it."""
    module = sys.modules[type(model).__module__]
    if hasattr(module, "apply_rotary_pos_emb"):
        module.apply_rotary_pos_emb = PLAIN_ROTARY.setdefault(module.__name__, module.apply_rotary_pos_emb)
    return module


@contextlib.contextmanager
def plain_rotary() -> Iterator[None]:
    """Let models that are not on a GPU compute inside: liger-kernel's rotary embedding, which cannot, replaces that of all of a kind."""
    replaced = {name: sys.modules[name].apply_rotary_pos_emb for name in PLAIN_ROTARY}
    try:
        for name, plain in PLAIN_ROTARY.items():
            sys.modules[name].apply_rotary_pos_emb = plain
        yield
    finally:
        for name, rotary in replaced.items():
            sys.modules[name].apply_rotary_pos_emb = rotary


def prove(model: PreTrainedModel, change: Change, device: torch.device) -> tuple[float, float]:
    """Apply `change`; return the first layer's largest relative error against float32, of output and gradients, before and after.

    That layer computes on `device`, wherever the model's weights are. Raises ValueError where it is larger after than rounding explains,
    and whatever `change` raises; the model is then as it was.
    """
    module = _keep_plain_rotary(model)
    as_it_was = {part: (part.__class__, dict(vars(part))) for part in model.modules()}
    home, layer = model.device, model.base_model.layers[0].to(device)
    width = getattr(model.config, "num_key_value_heads", 1)
    # for many rows other kernels run than for few (liger-kernel 0.8.5: from 131,072 rows of heads on); no multiples of a tile
    counts = (37, min(131_072 // width + 37, 20_011)) if device.type == "cuda" else (37,)
    try:
        exact = [trial(model, copy.deepcopy(layer).float(), rows, device) for rows in counts]
        plain = [trial(model, layer, rows, device) for rows in counts]
        change(model)
        changed = [trial(model, layer, rows, device) for rows in counts]
        before, after = (
            torch.stack([distances(one.values(), other.values()) for one, other in zip(exact, seen, strict=True)])
            for seen in (plain, changed)
        )
        too_far = ~(after <= FARTHER * before + ROUNDING)  # also where it is not a number
        if too_far.any():
            name = list(exact[0])[too_far.any(0).nonzero()[0].item()]
            raise ValueError(f"a layer's {name} has relative error {after.max().item():.2g}, transformers' own {before.max().item():.2g}")
    except Exception:
        for part, (kind, attributes) in as_it_was.items():
            part.__class__ = kind
            for name in set(vars(part)) - set(attributes):
                del vars(part)[name]
            vars(part).update(attributes)
        if module.__name__ in PLAIN_ROTARY:
            module.apply_rotary_pos_emb = PLAIN_ROTARY[module.__name__]
        raise
    finally:
        layer.to(home)
    return before.max().item(), after.max().item()


def trial(model: PreTrainedModel, layer: nn.Module, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Run a decoder layer on `rows` random hidden states in its dtype; return by name its output and the gradients of input and weights.

    They are one row of segments, whose attention is attend_segments, as exact in every dtype: without segments a GPU without a fast kernel
    for the dtype would hold every score of every head, 54 GB for 1.7B parameters in float32.
    """
    weights = dict(layer.named_parameters())
    dtype, draw = next(iter(weights.values())).dtype, torch.Generator().manual_seed(0)
    hidden, grad = (torch.randn(1, rows, model.config.hidden_size, generator=draw).to(device, model.dtype).to(dtype) for _ in range(2))
    hidden.requires_grad_()
    segments = [Segment(start, min(start + TRIAL_ROWS, rows)) for start in range(0, rows, TRIAL_ROWS)]
    packing, positions = to_device(pack(segments), device), torch.arange(rows, device=device)[None]
    embeddings = model.base_model.rotary_emb(hidden, positions)
    config = layer.self_attn.config
    own, config._attn_implementation = config._attn_implementation, SEGMENTS
    try:
        output = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=embeddings, packing=packing)
    finally:
        config._attn_implementation = own
    wanted = {"input": hidden, **weights}
    return {"output": output.detach(), **dict(zip(wanted, torch.autograd.grad(output, wanted.values(), grad), strict=True))}


def distances(expected: Iterable[torch.Tensor], seen: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return each pair's distance relative to the norm of the expected tensor; nan where a tensor has one, so that max() is nan, too."""
    pairs = [(a.float(), b.float()) for a, b in zip(expected, seen, strict=True)]
    return torch.stack([(b - a).norm() / a.norm().clamp(min=1e-12) for a, b in pairs])
