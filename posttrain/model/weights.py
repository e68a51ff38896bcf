"""What a model's weights are: their hashes and their scale."""

import hashlib

import torch
import xxhash


def hash_weights(module: torch.nn.Module) -> dict[str, str]:
    """A hash of the bytes of every tensor, by name. On the CPU, before sharding."""
    return {
        name: xxhash.xxh3_64_hexdigest(parameter.detach().contiguous().flatten().view(torch.uint8).numpy())
        for name, parameter in module.named_parameters()
    }


@torch.no_grad()
def scale_of_weights(module: torch.nn.Module) -> float:
    """The root mean square of the weights of its matrices."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() == 2]
    squares = sum(matrix.float().square().sum().double() for matrix in matrices)
    return float((squares / sum(matrix.numel() for matrix in matrices)).sqrt())


def digest(parts: dict[str, str]) -> str:
    """One hash for all."""
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
