"""How many positions a model's rows may have, and rotary frequencies that depend on how many a row has.

For the rope types `longrope` (Phi-3, Phi-4) and `dynamic` transformers (5.23) takes one set of frequencies for a whole batch, by its
longest position, and with `dynamic` also by what the module has seen before. Here every example gets those that it has alone.
"""

from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.data.packing import Packing

SCALED = ("linear", "dynamic", "yarn", "longrope", "llama3")  # rope types that stretch the positions of pretraining by `factor`
# keys of config.json for the positions that a model was made for; transformers reads GPT-2's n_positions by the first name
MOST_POSITIONS = ("max_position_embeddings", "max_seq_len", "seq_length")
ASSUMED_CONTEXT = 2048  # tokens that a model is asked with whose config names no limit


def longest_position(config) -> int | None:
    """Return how many positions a model was made for; None where its config names no limit, as with ALiBi.

    Where the rotary embedding is scaled that is `factor` times the positions of pretraining, if config.json's own limit, which many leave
    as it was, is not more. Raises ValueError for a number of positions below 1.
    """
    name, stated = next(((name, most) for name in MOST_POSITIONS if (most := getattr(config, name, None)) is not None), (None, None))
    if stated is not None and stated < 1:
        raise ValueError(f"the model's config.json has {name} {stated}; expected how many tokens it reads, at least 1")
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope  # where each kind of layer has its own, the others see a window only
    # with `linear`, which needs no other key, `stated` may be the scaled limit already; `dynamic` scales beyond it
    original = rope.get("original_max_position_embeddings") or (stated if rope.get("rope_type") == "dynamic" else None)
    if not stated or not original or rope.get("rope_type") not in SCALED or not rope.get("factor"):
        return stated
    return max(stated, int(rope["factor"] * original))


def context_of(config) -> int:
    """Return how many tokens a model reads, prompt and answer together."""
    return longest_position(config) or ASSUMED_CONTEXT


def same_frequencies_until(config) -> int | None:
    """Return the number of positions up to which all rows have the same rotary frequencies; None where they never depend on a row."""
    ends = [_end_of_first_frequencies(config, kind) for kind in [None, *(getattr(config, "layer_types", None) or [])]]
    return min((end for end in ends if end), default=None)


def frequencies_differ(config, lengths: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each pair of rows, of `lengths` and `others` positions, whether some layer's frequencies differ between the two."""
    kinds = [None, *set(getattr(config, "layer_types", None) or [])]
    return np.any([frequency_sets(config, lengths, kind) != frequency_sets(config, others, kind) for kind in kinds], axis=0)


def _rope_of(config, layer_type: str | None) -> dict:
    """Return the rope parameters of a kind of layer, or those of all (None)."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (rope if layer_type is None else rope.get(layer_type)) or {}


def _end_of_first_frequencies(config, layer_type: str | None) -> int | None:
    """Return up to which length rows have the frequencies of the shortest; None where all have."""
    rope = _rope_of(config, layer_type)
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    return rope["original_max_position_embeddings"] if kind == "longrope" else config.max_position_embeddings if kind == "dynamic" else None


def frequency_sets(config, lengths: np.ndarray, layer_type: str | None = None) -> np.ndarray:
    """Return for rows of these lengths numbers that are equal where transformers gives two rows, each alone, the same frequencies."""
    end = _end_of_first_frequencies(config, layer_type)
    if end is None:
        return np.zeros_like(lengths)
    return lengths > end if _rope_of(config, layer_type)["rope_type"] == "longrope" else np.maximum(lengths, end)


class RowFrequencies:
    """Lets a model's rotary embeddings give every example of a packed micro-batch the frequencies that it has alone.

    It changes those modules of the model whose frequencies depend on the row. Each is replaced, call by call, by a new one of its class,
    which has seen no other row.
    """

    def __init__(self, model: PreTrainedModel):
        self.packing: Packing | None = None  # how the rows that come next are divided; None: they are one example, or all of one length
        self.changed = [module for module in model.modules() if _depends_on_row(module)]
        for module in self.changed:
            module.forward = partial(self._forward, module)

    def restore(self) -> None:
        """Undo the changes."""
        for module in self.changed:
            del module.forward

    def _forward(self, module: nn.Module, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None):
        """Return cos and sin, (1, T, head dimension) each, for position_ids (1, T), as `module` gives them to each example alone."""
        which = {} if layer_type is None else {"layer_type": layer_type}
        runs = self._runs(module.config, layer_type, position_ids.shape[-1])
        parts = [type(module)(module.config).to(x.device)(x, position_ids[..., start:end], **which) for start, end in runs]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(part, dim=-2) for part in zip(*parts, strict=True))

    def _runs(self, config, layer_type: str | None, rows: int) -> list[tuple[int, int]]:
        """Divide the rows into stretches whose examples have the same frequencies.

        Raises ValueError where a prompt is shared by two answers with which it would have different ones.
        """
        if self.packing is None:
            return [(0, rows)]
        start, _, prefix_start, prefix_end = self.packing.segments.numpy().T
        sets = frequency_sets(config, self.packing.lengths.numpy(), layer_type)
        owner = np.searchsorted(start, prefix_start, side="right") - 1
        if (sets[owner] != sets)[prefix_end > prefix_start].any():
            raise ValueError("a shared prompt has other rotary frequencies with each of its answers; set share_prompt: False")
        first = np.flatnonzero(np.concatenate([[True], sets[1:] != sets[:-1]]))
        return list(zip(start[first].tolist(), [*start[first[1:]].tolist(), rows], strict=True))


def _depends_on_row(module: nn.Module) -> bool:
    """Whether this is a rotary embedding whose frequencies depend on how long a row is."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return hasattr(module, "config") and any(kind in ("longrope", "dynamic") for kind in kinds)
