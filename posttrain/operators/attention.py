"""Chooses at start which attention computes packed micro-batches; a fast one is compared with the plain one before it is used."""

from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn import attention as flash

from posttrain.data.packing import Segment, pack, to_device
from posttrain.operators.attention_segments import SEGMENTS, attend_segments
from posttrain.operators.attention_varlen import VARLEN, attend_varlen
from posttrain.operators.heads import heads_of
from posttrain.operators.layers import distances
from posttrain.operators.proof import tried

FLASH_VERSIONS = {9: ("FA3", "FA4", "FA2"), 10: ("FA4", "FA2")}  # by compute capability, the fastest first; other GPUs take FA2
SAME = 0.02  # largest relative difference at which two bfloat16 implementations count as the same


def choose(kernels: str, device: torch.device, dtype: torch.dtype, dropout: float, config) -> tuple[str, str]:
    """Return the name of the fastest attention that is right here, as registered in transformers, and why; `config` is the model's."""
    if kernels == "torch":
        return SEGMENTS, "kernels=torch"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return SEGMENTS, "variable-length flash attention needs an Ampere or newer GPU"
    if dtype == torch.float32 or dropout:
        return SEGMENTS, "variable-length flash attention takes bfloat16 and no dropout"
    if len(heads := {*heads_of(config)}) != 1:
        return SEGMENTS, f"its layers have {'heads of several kinds' if heads else 'no heads'}, and variable-length flash attention one"
    _activate("FA2")  # FA3 and FA4 would also replace what attend_segments calls
    expected, passed_over = trial(attend_segments, config, device, dtype), ""
    for name in FLASH_VERSIONS.get(torch.cuda.get_device_capability(device)[0], ("FA2",)):
        difference, why_not = tried(lambda name=name: _difference(name, expected, config), SAME)
        if difference is not None:
            return VARLEN, f"{name}, one call for all examples of a micro-batch, {difference:.1e} from one call each{passed_over}"
        passed_over += f"; not {name}: {why_not}"
    _activate("FA2")
    return SEGMENTS, f"no variable-length kernel works here{passed_over}"


def _difference(name: str, expected: list[torch.Tensor], config) -> float:
    """How far a version's output and gradients are from the expected ones, relative to their norm."""
    _activate(name)
    output = expected[0]
    return distances(expected, trial(attend_varlen, config, output.device, output.dtype)).max().item()


def _activate(name: str) -> None:
    """Select the flash attention behind torch's operators: FA2 is torch's own, later versions are packages that torch looks for.

    Raises ValueError where the package of FA4 is not installed; of FA3 there is none on PyPI that could be named.
    """
    if name == "FA4":
        try:
            version("flash-attn-4")
        except PackageNotFoundError:
            how = "export POSTTRAIN_EXTRAS=fa4 and source launch/env.sh, or pip install 'posttrain[fa4]'"
            raise ValueError(f"flash-attn-4 is not installed ({how})") from None
    if name != "FA2":
        flash.activate_flash_attention_impl(name)
    elif hasattr(flash, "current_flash_attention_impl") and flash.current_flash_attention_impl():
        flash.restore_flash_attention_impl()


def trial(function, config, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Run an attention function on random inputs with the heads of a model's `config`; return its output and three gradients.

    The segments are ones that could go wrong: odd lengths, a single token, prompts shared by answers that are longer, shorter or one token.
    """
    segments = [Segment(0, 1), Segment(1, 18), Segment(18, 319)]
    for prompt, chosen, rejected in ((129, 33, 45), (7, 64, 1), (1, 2, 3)):
        start = segments[-1].end
        middle = start + prompt + chosen
        segments += [Segment(start, middle), Segment(middle, middle + rejected, start, start + prompt)]
    packing, rows = to_device(pack(segments), device), segments[-1].end
    heads, kv_heads, width = heads_of(config)[0]
    draw = torch.Generator().manual_seed(0)
    *inputs, grad = (
        torch.randn(shape, generator=draw).to(device, dtype)
        for shape in [(1, heads, rows, width), (1, kv_heads, rows, width), (1, kv_heads, rows, width), (1, rows, heads, width)]
    )
    for x in inputs:
        x.requires_grad_()
    output, _ = function(None, *inputs, None, width**-0.5, packing)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]
