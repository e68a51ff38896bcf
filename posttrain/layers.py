"""What computes the layers of a model: decided once at start, with the reason, and proven before it is used.

On GPUs liger-kernel's fused RMSNorm, rotary embedding and SwiGLU. On CPUs without instructions for bfloat16, where torch (2.13) multiplies
bfloat16 matrices ten to sixty times slower than float32 ones, products in float32, rounded to bfloat16.
"""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SAME = 0.03  # largest relative difference, in bfloat16, of a layer's output and gradients with and without
ROWS = 37  # of the layer's trial: not a multiple of anything


def choose(model: PreTrainedModel, kernels: str, compiled: bool) -> str:
    """Put the fastest kernels into the model's layers, on its device; returns what was done, and why.

    Raises ValueError where a layer with them gives another output or gradient than the same layer without.
    """
    if kernels == "torch":
        return "transformers' own (kernels=torch)"
    if type(model).__name__ not in ARCHITECTURES:
        return f"transformers' own ({type(model).__name__} is not among {', '.join(ARCHITECTURES)})"
    compilation = "each decoder layer compiled; " if compiled else ""
    if multiplies_in_float32(model.device, model.dtype):
        difference = _proven(model, _multiply_in_float32)
        return f"{compilation}products in float32, this CPU has none for bfloat16 ({difference:.1e} from transformers' own)"
    if compiled:
        return "each decoder layer compiled"
    if model.device.type != "cuda":
        return "transformers' own (liger-kernel's need a GPU)"
    if find_spec("liger_kernel") is None:
        return "transformers' own (liger-kernel is not installed; pip install liger-kernel)"
    from liger_kernel.transformers import monkey_patch

    which = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
    difference = _proven(model, lambda model: monkey_patch._apply_liger_kernel_to_instance(model, **which))
    return f"liger-kernel {version('liger-kernel')}'s RMSNorm, rotary embedding and SwiGLU ({difference:.1e} from transformers' own)"


@cache
def multiplies_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Float32Linear(nn.Linear):
    """A linear layer that multiplies in float32 and keeps bfloat16. It replaces the class of an existing one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Float32Product.apply(x, self.weight, self.bias)


class _Float32Product(torch.autograd.Function):
    """x (..., I), weight (O, I), bias (O,) or None -> (..., O); saves what it was given, not the float32 copies."""

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
    for module in model.base_model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Float32Linear


def _proven(model: PreTrainedModel, change) -> float:
    """Change the model; returns how far that takes its first layer from what it was. Raises ValueError beyond SAME."""
    before = trial(model)
    change(model)
    after = trial(model)
    off = {name: (after[name].float() - one.float()).norm() / one.float().norm().clamp(min=1e-12) for name, one in before.items()}
    difference = max(off.values()).item()
    if not difference <= SAME:
        raise ValueError(
            f"a layer of {type(model).__name__} with the kernels for this machine differs from the same layer without by {difference:.2g} "
            f"of its norm (limit {SAME}), in output or gradients, most in {max(off, key=off.get)}. Set --kernels=torch"
        )
    return difference


def trial(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Output of the model's first layer, and gradients by its input and weights, on made-up hidden states."""
    base, layer = model.base_model, model.base_model.layers[0]
    draw = torch.Generator().manual_seed(0)
    hidden, grad = (torch.randn(1, ROWS, model.config.hidden_size, generator=draw).to(model.device, model.dtype) for _ in range(2))
    hidden.requires_grad_()
    positions = torch.arange(ROWS, device=model.device)[None]
    embeddings = base.rotary_emb(hidden, positions)
    output = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=embeddings)
    wanted = {"input": hidden, **dict(layer.named_parameters())}
    return {"output": output.detach(), **dict(zip(wanted, torch.autograd.grad(output, wanted.values(), grad), strict=True))}
