"""Loads a model and wraps it as a Policy, whose forward pass returns the log-probs of a micro-batch's trained tokens.

`Policy.forward(micro_batch)` is the only forward pass of training, validation and the reference.
"""

import contextlib
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedModel

from posttrain.common.errors import reason
from posttrain.data import tokenization
from posttrain.data.packing import MicroBatch
from posttrain.model.forms import source_of
from posttrain.model.loading import load_model
from posttrain.model.sample_rows import packed_rows, plain_logps, sample_rows
from posttrain.model.weights import digest, hash_weights, scale_of_weights
from posttrain.operators import attention, layers, positions
from posttrain.operators.logprob import LogProbHead
from posttrain.operators.positions import RowFrequencies
from posttrain.operators.saved_form import widen_feed_forward
from posttrain.parallel import distribute
from posttrain.parallel.ranks import on_rank_0
from posttrain.recipes.keys import Recipe
from posttrain.run.stored import read_facts

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")  # a decoder layer's feed-forward block, by architecture
KNOWN = f"known to work: {', '.join(layers.ARCHITECTURES)}"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}  # nats per token by which packed and unpacked log-probs may differ, for rounding

ABSURD = 1e5  # nats per token that no model is surprised by, unless some of its weights are


class Policy(nn.Module):
    """A causal language model that returns log-probs of a micro-batch's targets. Its `model` stays an ordinary transformers model."""

    def __init__(self, model: PreTrainedModel, attention_name: str):
        """Change the model's head, attention and rotary embedding in place. Raises ValueError where check_packable does."""
        super().__init__()
        check_packable(model)
        head = model.get_output_embeddings()
        self.weights: dict[str, str] = {}  # hash of every tensor as loaded, by name
        self.fingerprint = ""  # one hash of all tensors of the model with which the run began
        self.is_from_checkpoint = False  # whether that model is gone, so that the weights loaded are those of the run's newest checkpoint
        self.scale = math.nan  # root mean square of all weight matrices as loaded
        head.__class__ = LogProbHead
        self.frequencies, self.window = RowFrequencies(model), positions.attention_window(model.config)
        model.set_attn_implementation(attention_name)
        model.config.use_cache = False
        self.model = model

    @property
    def head(self) -> LogProbHead:
        """The language-model head, which computes log-probs from hidden states."""
        return self.model.get_output_embeddings()

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return the targets' log-probs, (N,) in float32; for a micro-batch without targets the likeliest token after each of its rows."""
        if self.window and batch.packing.max_k > self.window:
            raise ValueError(
                f"a row has {batch.packing.max_k:,} positions; packed attention knows no window, and the model's is {self.window:,}"
            )
        self.frequencies.packing = batch.packing
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, packing=batch.packing, use_cache=False
        ).last_hidden_state
        asked = hidden[0].index_select(0, batch.rows)
        return self.head(asked).argmax(-1) if batch.targets is None else self.head(asked, batch.targets)


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
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # torch computes no gradient for the row of a padding token, which data may hold
    if jitter := still(model):
        choices.append(("noise", f"{jitter} is set to 0: noise on what routers see would be drawn anew by each rank and layout"))
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

    Where the model is to be `sharded`, rank 0, which has its weights, looks what is right, for all.
    """
    name, reason = attention.choose(recipe.kernels, device, getattr(torch, recipe.dtype), recipe.dropout, model.config)
    built: list[Policy] = []

    def build() -> None:
        with distribute.computing_on(model, device) if sharded else contextlib.nullcontext():
            try:
                built.append(build_policy(model, name, recipe.checks == "on", device))
            except ValueError as error:
                raise ValueError(f"{source_of(recipe.model_path, recipe.out_dir)}: {error}") from error

    if sharded:
        chosen, change = on_rank_0(lambda: layers.choose(model, recipe.kernels, recipe.compile, device))
        if change and dist.get_rank() > 0:
            change(model)
        on_rank_0(build)
    else:
        chosen, _ = layers.choose(model, recipe.kernels, recipe.compile, device)
        build()
    policy = built[0] if built else Policy(model, name)
    head = policy.head.choose(recipe.kernels, device, model.num_parameters() * model.dtype.itemsize)
    return policy, [f"attention: {name} ({reason})", f"layers: {chosen}", f"head: {head}"]


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


def still(model: PreTrainedModel) -> str:
    """Set the noise that routers of some experts add in training to 0; returns the setting's name, "" where there is none."""
    found = sorted({name for module in model.modules() for name, value in vars(module).items() if name.endswith("jitter_noise") and value})
    for module in model.modules():
        for name in found:
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return " and ".join(found)


def check_packable(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose attention cannot be replaced by one that sees all, or whose head is not a plain linear one."""
    head, why_not = model.get_output_embeddings(), positions.unsupported_attention(model.config)
    if why_not is None and not model.is_backend_compatible():
        why_not = "its attention is its own, and packing needs one that can be replaced"
    elif why_not is None and (type(head) is not nn.Linear or head.bias is not None):
        seen = "no head" if head is None else f"a head of type {type(head).__name__}{' with a bias' * (type(head) is nn.Linear)}"
        why_not = f"it has {seen}; expected a linear one without a bias"
    elif why_not is None and getattr(model.config, "final_logit_softcapping", None):
        why_not = "its head bounds the logits (final_logit_softcapping), which the log-probs here are not"
    if why_not:
        raise ValueError(f"{type(model).__name__} cannot be trained packed: {why_not}; {KNOWN}")


def build_policy(model: PreTrainedModel, attention_name: str, checks: bool, device: torch.device | None = None) -> Policy:
    """Wrap a model as a Policy. `device`: where it computes, if not where its weights are.

    With `checks`, or if its architecture is not in ARCHITECTURES, its packed log-probs are compared with transformers' own. Raises
    ValueError where they differ or are not finite, where packing fails, and for attention that no row would see whole.
    """
    kind = type(model).__name__
    known = kind in layers.ARCHITECTURES
    check_packable(model)
    if known and not checks:
        return Policy(model, attention_name)
    try:
        plain, packed, policy = _both_ways(model, attention_name, device or model.device)
    except Exception as error:
        if known:
            raise
        # whatever the code of an architecture raises that does not expect packed rows, or another attention than its own
        own = str(error) if isinstance(error, ValueError) else f"transformers' code of it does not take packed rows ({reason(error)})"
        raise ValueError(f"{kind} cannot be trained packed: {own}; {KNOWN}") from error
    if not plain.abs().max() < ABSURD:
        seen = f"of {plain.abs().max():.1g} nats" if plain.isfinite().all() else "that are not finite"
        raise ValueError(f"the {kind} gives log-probs {seen}: its weights are damaged, or its training diverged")
    difference = (plain - packed).abs().max().item()
    if not difference <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"{kind}: the packed forward pass differs from transformers' own by {difference:.3g} nats per token "
            f"(limit {TOLERANCE[model.dtype]}). Its attention or head does something that packing does not reproduce, so it is refused; "
            f"{KNOWN}"
        )
    return policy


@torch.no_grad()
def _both_ways(model: PreTrainedModel, attention_name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Policy]:
    """Return log-probs of sample rows by transformers' own forward pass, those by the packed one, twice in two orders, and the Policy."""
    rows = sample_rows(model.config)
    plain = [plain_logps(model, row, device) for row in rows]
    policy = Policy(model, attention_name)
    packed = [policy(packed_rows(order).to(device)).cpu() for order in (rows, rows[::-1])]
    return torch.cat([*plain, *plain[::-1]]), torch.cat(packed), policy


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
