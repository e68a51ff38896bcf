"""Loads a model and wraps it as a Policy, whose forward pass returns the log-probs of a micro-batch's trained tokens.

`Policy.forward(micro_batch)` is the only forward pass of training, validation and the reference.
"""

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedModel, activations

from posttrain.common.errors import reason
from posttrain.data import tokenization
from posttrain.data.packing import MicroBatch
from posttrain.model import proof
from posttrain.model.classes import freeze_all_but_text
from posttrain.model.forms import source_of
from posttrain.model.loading import load_model
from posttrain.model.passes import Apart, Packed, PackedByItself, Whole
from posttrain.model.weights import digest, hash_weights, scale_of_weights
from posttrain.operators import attention, layers
from posttrain.operators.attention_segments import SEGMENTS
from posttrain.operators.heads import scale_and_cap
from posttrain.operators.logprob import LogProbHead, logps_of
from posttrain.operators.saved_form import widen_feed_forward
from posttrain.parallel import distribute
from posttrain.parallel.ranks import on_rank_0
from posttrain.recipes.keys import Recipe
from posttrain.run.stored import read_facts

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")  # a decoder layer's feed-forward block, by architecture
KNOWN = f"known to work: {', '.join(layers.ARCHITECTURES)}"
Way = Packed | Apart | Whole
WAYS: dict[str, Callable[..., Way]] = {way.name: way for way in (Packed, PackedByItself, Apart, Whole)}
NOISE = {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"}  # attributes of routers and blocks of experts
ABSURD = 1e5  # nats per token that no model is surprised by, unless some of its weights are


class Policy(nn.Module):
    """A causal language model that returns log-probs of a micro-batch's targets. Its `model` stays an ordinary transformers model."""

    def __init__(self, model: PreTrainedModel, way: Way):
        """Change the model's head in place; `way` is how it computes."""
        super().__init__()
        self.weights: dict[str, str] = {}  # hash of every tensor as loaded, by name
        self.fingerprint = ""  # one hash of all tensors of the model with which the run began
        self.is_from_checkpoint = False  # whether that model is gone, so that the weights loaded are those of the run's newest checkpoint
        self.scale = math.nan  # root mean square of all weight matrices as loaded
        self.way, self.why_slower = way, ""  # and why it is none that is faster, where there are any
        model.config.use_cache = False
        self.model = model
        if not isinstance(way, Whole):
            self.head.__class__ = LogProbHead
            self.head.scale, self.head.cap = scale_and_cap(model.config.get_text_config())

    @property
    def head(self) -> LogProbHead:
        """The language-model head, which computes log-probs from hidden states."""
        return self.model.get_output_embeddings()

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return the targets' log-probs, (N,) in float32; for a micro-batch without targets the likeliest token after each of its rows."""
        if isinstance(self.way, Whole):
            logits = self.way.logits(batch)
            return logits.argmax(-1) if batch.targets is None else logps_of(logits, batch.targets)
        asked = self.way.hidden(batch)
        return self.head(asked).argmax(-1) if batch.targets is None else self.head(asked, batch.targets)


def fastest_policy(model: PreTrainedModel, attention_name: str) -> Policy:
    """Wrap a model as a Policy that computes in the fastest way which its code allows, without a comparison with transformers' own."""
    for _, make in _ways(model, attention_name, {}):
        with contextlib.suppress(ValueError):
            return Policy(model, make())
    raise AssertionError("a row at a time, with all logits, is possible with any model")


class Facts(NamedTuple):
    """What rank 0 saw of a model's weights when it read them: their hashes, scale and fingerprint, as Policy has them."""

    weights: dict[str, str]
    scale: float
    fingerprint: str
    is_from_checkpoint: bool


def load_policy(
    recipe: Recipe, tokenizer, device: torch.device, *, sharded: bool, checkpoint_function=None, frozen: bool = False
) -> tuple[Policy, list[tuple[str, str]]]:
    """Load the recipe's model as a Policy with the fastest kernels. All ranks; rank 0 alone reads the model's files.

    Every rank gets all weights, on `device`; but if the model is to be `sharded` next, which a single rank may have no room for, rank 0 has
    them on the CPU, and the others have their shapes. Also returns what was chosen, as (label, text), for the first screen.
    `checkpoint_function` is DeepSpeed's activation checkpointing, None for torch's; a `frozen` policy, a reference, has none.
    """
    own: list[PreTrainedModel] = []

    def read() -> tuple[PreTrainedModel, list[tuple[str, str]], Facts]:
        """Read the model; returns what the other ranks get."""
        model, *others = _read(recipe, tokenizer, device, frozen)
        own.append(model)
        return distribute.without_weights(model), *others

    model, choices, facts = on_rank_0(read)
    if own:
        model = own[0]
    if sharded:
        distribute.move_buffers(model, device)
    else:
        distribute.send_weights(model, device)
    policy, kernels = _with_kernels(recipe, model, device, sharded)
    choices += [("kernel", text) for text in kernels]
    policy.weights, policy.scale, policy.fingerprint, policy.is_from_checkpoint = facts
    if not frozen:
        checkpoint_activations(model, recipe.activation_checkpointing, checkpoint_function)
    if recipe.compile:
        for layer in layers.decoder_layers(model):
            layer.forward = torch.compile(layer.forward, dynamic=True)
    if device.type == "cuda":  # what trials took would count as the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return policy, choices


def _read(recipe: Recipe, tokenizer, device: torch.device, frozen: bool) -> tuple[PreTrainedModel, list[tuple[str, str]], Facts]:
    """Load the recipe's model on the CPU, and change it as training needs it; returns also what was done, as (label, text). Rank 0."""
    dtype = getattr(torch, recipe.dtype)
    source = source_of(recipe.model_path, recipe.out_dir)
    is_gone = source != recipe.model_path
    if is_gone and frozen:
        raise ValueError(
            f"the model at {recipe.model_path} is gone, and the reference needs its weights: put it back, or name where it is now with "
            "--sft_checkpoint_path. --reference=precompute goes on without it where the data's folder has all its log-probs"
        )
    notes = [f"{recipe.model_path} is gone; the run goes on from {source}, which has its weights"] if is_gone else []
    model = load_model(source, dtype, recipe.how_to_make_model, notes.append)
    choices = [("model", note) for note in notes]
    if added := tokenization.grow_embeddings(model, tokenizer):
        choices.append(("embeddings", f"{added} rows added for tokens that the checkpoint lacks; they start at the mean of the others"))
    if frozen_parts := freeze_all_but_text(model):
        what = f"{frozen_parts:,} parameters, which do not read text or are constants"
        choices.append(("frozen", f"{what}, are not trained, and are written as they were"))
    for module in model.modules():
        for name, part in module.named_children():
            if part is activations.gelu_new:  # one for all models of the process (GPT-1): engines would hook into each other's
                setattr(module, name, copy.deepcopy(part))
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # torch computes no gradient for the row of a padding token, which data may hold
    if jitter := still(model):
        choices.append(("noise", f"{jitter} is off: noise on what routers see would be drawn anew by each rank and layout"))
    set_dropout(model, recipe.dropout)
    if recipe.dropout:
        choices.append(("dropout", f"{recipe.dropout}: the loss curve also depends on the number of GPUs and the micro-batches"))
    weights = hash_weights(model)
    if widened := widen_feed_forward(model):
        choices.append(("kernel", widened))
    fingerprint = read_facts(Path(recipe.out_dir), "inputs")["inputs"].get("model", "") if is_gone else digest(weights)
    return model, choices, Facts(weights, scale_of_weights(model, device), fingerprint, is_gone)


def _with_kernels(recipe: Recipe, model: PreTrainedModel, device: torch.device, sharded: bool) -> tuple[Policy, list[str]]:
    """Wrap a model as a Policy with the fastest kernels that are right on `device`; returns also which, and why. All ranks.

    Rank 0 looks how the model computes rightly, for all; where the model is to be `sharded`, it alone has the weights.
    """
    name, reason = attention.choose(recipe.kernels, device, getattr(torch, recipe.dtype), recipe.dropout, model.config.get_text_config())
    built: list[Policy] = []

    def build() -> tuple[str, str]:
        with distribute.computing_on(model, device) if sharded else contextlib.nullcontext():
            try:
                built.append(build_policy(model, name, recipe.checks == "on", device))
            except ValueError as error:
                raise ValueError(f"{source_of(recipe.model_path, recipe.out_dir)}: {error}") from error
        return built[0].way.name, built[0].way.attention, built[0].why_slower

    if sharded:
        chosen, change = on_rank_0(lambda: layers.choose(model, recipe.kernels, recipe.compile, device))
        if change and dist.get_rank() > 0:
            change(model)
    else:
        chosen, _ = layers.choose(model, recipe.kernels, recipe.compile, device)
    way, name, why_slower = on_rank_0(build)
    policy = built[0] if built else Policy(model, WAYS[way](model, name))
    head = "transformers' own, all logits at once"
    if not isinstance(policy.way, Whole):
        head = policy.head.choose(recipe.kernels, device, model.num_parameters() * model.dtype.itemsize)
    said = f"{name} ({why_slower or reason})" if policy.way.is_packed else f"transformers' own, {way}, which is slower ({why_slower})"
    return policy, [f"attention: {said}", f"layers: {chosen}", f"head: {head}"]


def set_dropout(model: PreTrainedModel, dropout: float) -> None:
    """Set attention dropout, the only one that the known architectures have, to the recipe's value, and all other dropout to 0.

    Raises ValueError for an architecture that has no attention dropout that could be set.
    """
    numbers = [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float | int) and not isinstance(value, bool)  # OPT's layerdrop, SeedOss's residual_dropout
    ]
    if dropout and not any(name == "attention_dropout" for _, name in numbers):
        raise ValueError(f"{type(model).__name__} has no attention dropout that can be set; set dropout: 0")
    for module, name in numbers:
        setattr(module, name, dropout if name == "attention_dropout" else 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _as_in_use(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for a module's `train`, and change nothing."""
    return module


def still(model: PreTrainedModel) -> str:
    """Turn off the noise that routers of some experts add in training; returns the settings' names, "" where there is none.

    A router that computes otherwise in training than in use, as PhiMoE's, which draws experts at random, computes as in use. Its
    router_jitter_noise is no noise but a threshold.
    """
    found = set()
    for module in model.modules():
        for name in NOISE.intersection(name for name, value in vars(module).items() if value):
            found.add(name)
            setattr(module, name, None if name == "moe_jitter_eps" else 0.0)  # DBRX draws noise unless it is None
        kind = type(module)
        if "Router" in kind.__name__ and "training" in inspect.unwrap(kind.forward).__code__.co_names:
            found.add(f"what {kind.__name__} does in training only")
            module.training, module.train = False, partial(_as_in_use, module)
    return " and ".join(sorted(found))


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's head is a linear layer, of which log-probs are computed without all logits at once."""
    return type(model.get_output_embeddings()) in (nn.Linear, LogProbHead)


def build_policy(model: PreTrainedModel, attention_name: str, checks: bool, device: torch.device | None = None) -> Policy:
    """Wrap a model as a Policy. `device`: where it computes, if not where its weights are.

    With `checks`, or if its architecture is not in ARCHITECTURES, its log-probs and gradients are compared with transformers' own, and the
    fastest way that agrees is taken: one that does not agree packed is computed a row at a time. `policy.why_slower` says why. Raises
    ValueError where no way agrees, or log-probs are not finite.
    """
    kind = type(model).__name__
    if kind in layers.ARCHITECTURES and not checks:
        return fastest_policy(model, attention_name)
    device = device or model.device
    try:
        plain = proof.plain(model, device)
    except Exception as error:  # of any kind: what a config.json of somebody else's holds may fail anywhere in an architecture's code
        raise ValueError(f"transformers' own code of the {kind} cannot compute a row of text: {reason(error)}") from error
    if not plain.logps.abs().max() < ABSURD:
        seen = f"of {plain.logps.abs().max():.1g} nats" if plain.logps.isfinite().all() else "that are not finite"
        raise ValueError(f"the {kind} gives log-probs {seen}: its weights are damaged, or its training diverged")
    tried: dict[str, str] = {}  # the way first found not to work, by the reason
    for name, make in _ways(model, attention_name, tried):
        try:
            policy = Policy(model, way := make())
        except Exception as error:
            if kind in layers.ARCHITECTURES:
                raise
            tried.setdefault(reason(error), name)
            continue
        # whatever the code of an architecture raises that does not expect packed rows, or another attention than its own
        try:
            why_not = proof.difference(policy, plain, device)
        except Exception as error:
            if kind in layers.ARCHITECTURES:
                raise
            why_not = str(error) if isinstance(error, ValueError) else f"transformers' code of it does not take it ({reason(error)})"
        if why_not is None:
            policy.why_slower = "" if way.attention == attention_name else _said(tried)
            return policy
        tried.setdefault(why_not, name)
        way.restore()
    raise ValueError(f"{kind} cannot be trained: no way to compute it agrees with transformers' own ({_said(tried)}); {KNOWN}")


def _said(tried: dict[str, str]) -> str:
    """Say which ways were tried, and why they are not taken."""
    return "; ".join(f"not {way}: {why}" for why, way in tried.items())


def _ways(model: PreTrainedModel, fastest: str, tried: dict[str, str]) -> Iterator[tuple[str, Callable[[], Way]]]:
    """Yield the ways in which a model may compute, the fastest first, with their names; what is known not to work is noted in `tried`."""
    if not has_plain_head(model):
        tried[f"its head is a {type(model.get_output_embeddings()).__name__}, not a linear layer"] = Packed.name
        yield Whole.name, partial(Whole, model)
        return
    for attention_name in dict.fromkeys((fastest, SEGMENTS)):
        for make in (Packed, PackedByItself):
            yield make.name if attention_name == SEGMENTS else attention_name, partial(make, model, attention_name)
    yield Apart.name, partial(Apart, model)
    yield Whole.name, partial(Whole, model)


def checkpoint_activations(model: PreTrainedModel, mode: str, deepspeed_checkpoint=None) -> None:
    """Let backward recompute activations: those of whole layers (full, offload), or of feed-forward blocks, which have most (selective).

    `deepspeed_checkpoint` is DeepSpeed's function if its JSON section is to decide how. Recomputing only cheap operations, by torch's
    selective contexts, is not possible at ZeRO-3: gathering inside the recomputed region changes the sequence of operations (torch 2.13).

    Raises ValueError for an architecture that the mode is not possible with.
    """
    kind = type(model).__name__
    if mode in ("full", "offload"):
        function = deepspeed_checkpoint or partial(recompute, use_reentrant=False)
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"activation_checkpointing={mode}: {kind} cannot recompute whole layers; take selective or none")
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    elif mode == "selective":
        for layer in layers.decoder_layers(model):
            block = next((found for name in FEED_FORWARD if (found := getattr(layer, name, None)) is not None), None)
            if block is None:
                raise ValueError(
                    f"activation_checkpointing=selective recomputes feed-forward blocks, and the layers of {kind} have none that is a "
                    f"module ({', '.join(FEED_FORWARD)}); take full or none"
                )
            block.forward = partial(recompute, block.forward, use_reentrant=False)
