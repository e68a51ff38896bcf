"""Brings a model, which rank 0 alone reads from files, to all ranks."""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose parameters have shapes and no values (torch's device "meta"); buffers are copied whole."""
    memo = {id(one): nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, memo)


def send_weights(model: nn.Module, device: torch.device) -> None:
    """Put a model's parameters and buffers on `device`, all with the values that rank 0 has. All ranks."""
    each_weight(model, device, lambda parameter: dist.broadcast(parameter.data.view(torch.uint8), 0))


@torch.no_grad()
def each_weight(model: nn.Module, device: torch.device, receive: Callable[[nn.Parameter], object]) -> None:
    """Put a model on `device`, one parameter after another, and call `receive` on each, which sets its value where it had none."""
    made: dict[int, nn.Parameter] = {}  # by the id of the one that was there: tied ones stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = _allocated(parameter, device)
                receive(made[id(parameter)])
            setattr(module, name, made[id(parameter)])
    move_buffers(model, device)


def _allocated(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return a parameter on `device`: itself, moved there, or where it has no values a new one, of any values."""
    if not parameter.is_meta:
        parameter.data = parameter.data.to(device)
        return parameter
    return nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put a model's buffers on `device`."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@contextlib.contextmanager
def computing_on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a model whose parameters are on the CPU compute on `device`, without gradients: each module's are there while it computes.

    So a model computes on a GPU that has no room for it. It takes as long as all its weights take to get there, for each forward pass.
    """
    homes: dict[nn.Parameter, torch.Tensor] = {}

    def fetch(module: nn.Module, _) -> None:
        for parameter in module.parameters(recurse=False):
            homes.setdefault(parameter, parameter.data)
            parameter.data = homes[parameter].to(device, copy=True)

    def leave(module: nn.Module, *_) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = homes[parameter]

    handles = [module.register_forward_pre_hook(fetch) for module in model.modules()]
    handles += [module.register_forward_hook(leave, always_call=True) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
