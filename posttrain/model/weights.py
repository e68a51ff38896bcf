"""Hashes a model's weights, and measures their scale."""

import hashlib

import torch
import xxhash

from posttrain.operators.saved_form import persistent_buffers


def hash_weights(module: torch.nn.Module) -> dict[str, str]:
    """Return a hash of the bytes of every parameter and persistent buffer, by name. The module must be on the CPU and not sharded yet."""
    return {
        name: xxhash.xxh3_64_hexdigest(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        for name, tensor in (dict(module.named_parameters()) | persistent_buffers(module)).items()
    }


@torch.no_grad()
def scale_of_weights(module: torch.nn.Module, device: torch.device) -> float:
    """Return the root mean square of the weights of all matrices, computed on `device`, one after another."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() == 2]
    squares = sum(matrix.to(device).float().square().sum().double() for matrix in matrices)
    return float((squares / sum(matrix.numel() for matrix in matrices)).sqrt())


def digest(parts: dict[str, str]) -> str:
    """Return one hash of all named hashes, whatever their order."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
