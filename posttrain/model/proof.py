"""Compares how a model computes micro-batches with transformers' own forward pass: the log-probs of a few rows, and their gradients.

Windows are shortened while it is done, in both, so that the rows are longer than any.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from posttrain.model.sample_rows import packed_rows, plain_logps, sample_rows
from posttrain.operators.layers import text_model

LOGPS = {torch.float32: 1e-4, torch.bfloat16: 0.15}  # nats per token by which log-probs may differ, for rounding
# how far a tensor's gradient may be away, relative to its norm, or to a hundredth of the largest of all where it is smaller
GRADIENTS = {torch.float32: 1e-3, torch.bfloat16: 0.2}
SMALL, HUGE = 0.01, 1e9
WINDOWS = re.compile("sliding_window|sliding_window_size|attention_window_size|attention_chunk_size")  # of configs and attention layers
SHORT = 6  # positions of a window in the comparison


class Computed(NamedTuple):
    """What a way of computing gives for the sample rows."""

    logps: torch.Tensor  # of all tokens but each row's first, in the order of the rows
    gradients: dict[str, torch.Tensor]  # by name, of the sum of the log-probs, each times a number of its own; empty where not computed


def plain(model: PreTrainedModel, device: torch.device) -> Computed:
    """Compute the sample rows by transformers' own forward pass, one at a time; `device` is where it computes."""
    with _short_windows(model), _watched(model, device) as watched:
        logps = torch.cat([plain_logps(model, row, device) for row in sample_rows(model.config.get_text_config())])
        return Computed(logps.detach(), watched.gradients(logps))


def difference(policy, expected: Computed, device: torch.device) -> str | None:
    """Say where a policy differs from what transformers computes, in one sentence; None where it does not.

    The rows are computed in two orders, so that one would see what the row before it leaves behind.
    """
    rows, dtype = sample_rows(policy.model.config.get_text_config()), policy.model.dtype
    with _short_windows(policy.model):
        for reverse in (False, True):
            with _watched(policy.model, device) as watched:
                logps = policy(packed_rows(rows[::-1] if reverse else rows).to(device)).cpu()
                logps = torch.cat(logps.split([len(row.ids) - 1 for row in rows[::-1]])[::-1]) if reverse else logps
                gradients = watched.gradients(logps)
            apart = (logps.detach() - expected.logps).abs().max().item()
            if not apart <= LOGPS[dtype]:
                return f"its log-probs differ from transformers' own by {apart:.3g} nats per token (limit {LOGPS[dtype]})"
            if (why_not := _farthest(expected.gradients, gradients, GRADIENTS[dtype])) is not None:
                return why_not
    return None


def _farthest(expected: dict[str, torch.Tensor], seen: dict[str, torch.Tensor], limit: float) -> str | None:
    """Say which gradient differs most, if one differs by more than `limit`.

    Left out is what is huge, or not finite, in transformers' own: a row of the embedding that is all zeros, as many of a padding token
    are, is divided by next to nothing in the first norm.
    """
    finite = {name: gradient.abs() < HUGE for name, gradient in expected.items()}
    expected, seen = ({name: one[name][is_finite].double() for name, is_finite in finite.items()} for one in (expected, seen))
    largest = max((gradient.norm().item() for gradient in expected.values()), default=0.0)
    worst, name = (
        max(
            (((seen[name] - gradient).norm().item() / max(gradient.norm().item(), SMALL * largest, 1e-12)), name)
            for name, gradient in expected.items()
        )
        if expected
        else (0.0, "")
    )
    return f"the gradient of {name} differs from transformers' own by {worst:.2g} (relative, limit {limit})" if not worst <= limit else None


class _Watched:
    """The gradients of the sample rows' embeddings, and of the parameters that are vectors, which take hardly any memory."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.used = torch.cat([row.ids for row in sample_rows(model.config.get_text_config())]).unique()
        width = model.get_input_embeddings().weight.shape[1]
        self.embedded = torch.zeros(len(self.used), width, dtype=model.dtype, device=device).requires_grad_()
        self.wanted = {"the embeddings": self.embedded} | {name: p for name, p in text_model(model).named_parameters() if p.dim() == 1}

    def add(self, _, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """Add to what the embedding gives zeros, whose gradient is that of the embeddings, in whatever order the rows come."""
        return output + self.embedded[torch.searchsorted(self.used.to(inputs[0].device), inputs[0])]

    def gradients(self, logps: torch.Tensor) -> dict[str, torch.Tensor]:
        """Differentiate the log-probs, each times a number of its own."""
        if not logps.requires_grad:
            return {}
        weights = torch.rand(len(logps), generator=torch.Generator().manual_seed(0)) + 0.5
        found = torch.autograd.grad((logps * weights).sum(), list(self.wanted.values()), allow_unused=True)
        zeros = {name: torch.zeros(tensor.shape) for name, tensor in self.wanted.items()}
        return zeros | {name: g.float().cpu() for name, g in zip(self.wanted, found, strict=True) if g is not None}


@contextlib.contextmanager
def _watched(model: PreTrainedModel, device: torch.device) -> Iterator[_Watched]:
    """Let the log-probs computed inside have gradients, unless the model's weights are brought to `device` layer by layer."""
    watched, needed = _Watched(model, device), {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in needed:
        parameter.requires_grad_(parameter.dim() == 1)
    handle = model.get_input_embeddings().register_forward_hook(watched.add)
    try:
        with torch.set_grad_enabled(model.device.type == device.type):
            yield watched
    finally:
        handle.remove()
        for parameter, was_needed in needed.items():
            parameter.requires_grad_(was_needed)


@contextlib.contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten all windows of attention to SHORT positions."""
    text = text_model(model)
    holders = {id(holder): holder for part in text.modules() for holder in (part, getattr(part, "config", None)) if holder is not None}
    found = [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if isinstance(value, int) and not isinstance(value, bool) and value > SHORT and WINDOWS.fullmatch(name)
    ]
    for holder, name, _ in found:
        setattr(holder, name, SHORT)
    try:
        yield
    finally:
        for holder, name, value in found:
            setattr(holder, name, value)
