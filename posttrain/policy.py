"""The model: loaded from any accepted form, wrapped so that its forward pass gives log-probs of trained tokens.

`Policy.forward(micro_batch)` is the only forward pass of training, validation and the reference.
"""

import math
import pickle
from functools import partial
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from posttrain import attention, checkpoint, ckpt_pt, hub, layers, shards, tokenization
from posttrain.chat import ChatFormat, render_prompt
from posttrain.checks import digest, hash_weights, same_on_all_ranks, scale_of_weights
from posttrain.config import DPORecipe, Recipe, SFTRecipe
from posttrain.data import MicroBatch, RowBuilder
from posttrain.logprob import LogProbHead

HOW_TO_MAKE = {
    SFTRecipe: (
        "Name the base model with --checkpoint_path=PATH: a Hugging Face folder or hub name, or a ckpt.pt file; for example\n"
        "    hf download Qwen/Qwen3-1.7B-Base --local-dir checkpoints/qwen3_1.8b"
    ),
    DPORecipe: (
        "It is the result of SFT; make it with\n    deepspeed --num_gpus 8 posttrain/sft.py\nor name one with --sft_checkpoint_path=PATH"
    ),
}
PREPARE = {SFTRecipe: "prepare_sft.py --dataset alpaca", DPORecipe: "prepare_dpo.py --dataset ultrafeedback"}
PROBE = [{"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "two"), ("user", "three"))]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}  # nats a token, packed against unpacked: rounding only


class Policy(nn.Module):
    """A causal language model that answers with log-probs. Its `model` stays an ordinary transformers model."""

    def __init__(self, model: PreTrainedModel, attention_name: str):
        super().__init__()
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            raise ValueError(f"{type(model).__name__} has a head of type {type(head).__name__}; expected a linear one without bias")
        self.weights: dict[str, str] = {}  # hashes of the tensors as loaded
        self.scale = math.nan  # of the matrices' weights, their root mean square
        head.__class__ = LogProbHead
        model.set_attn_implementation(attention_name)
        model.config.use_cache = False
        self.model = model

    @property
    def head(self) -> LogProbHead:
        return self.model.get_output_embeddings()

    @property
    def fingerprint(self) -> str:
        return digest(self.weights)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Float32 log-probs (N,) of the micro-batch's targets; without targets the likeliest token after each of its rows."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, packing=batch.packing, use_cache=False
        ).last_hidden_state
        asked = hidden[0].index_select(0, batch.rows)
        return self.head(asked).argmax(-1) if batch.targets is None else self.head(asked, batch.targets)


def find_model(path: str, how_to_make: str) -> None:
    """Raises FileNotFoundError with `how_to_make` unless there is a model at `path`. Reads nothing."""
    place, seen = Path(path), "nothing"
    if ckpt_pt.is_ckpt_pt(path):
        found = place.is_file()
    elif checkpoint.is_checkpoint(place):
        found, seen = (
            (checkpoint.model_description(place) / "config.json").is_file(),
            "a checkpoint outside its run, whose model/ describes it",
        )
    elif (place / "run.json").is_file():
        found, seen = False, "a run; its result is in final/, and checkpoints/step_* are taken, too"
    elif place.is_dir():
        found, seen = (place / "config.json").is_file(), "a folder without config.json"
    elif found := hub.is_hub_name(path):
        found = hub.is_reachable() or isinstance(try_to_load_from_cache(path, "config.json"), str)
        seen = "no such folder; as a hub name it is not in the local cache, and the hub cannot be reached"
    if not found:
        raise FileNotFoundError(f"there is no model at {path} (found {seen}). {how_to_make}")


def load_model(path: str, dtype: torch.dtype | None, how_to_make: str) -> PreTrainedModel:
    """The model at `path`: a Hugging Face folder, a hub name, a ckpt.pt file or a run's checkpoint; in `dtype`, None for its own.

    Raises ValueError for one that is damaged.
    """
    find_model(path, how_to_make)
    if ckpt_pt.is_ckpt_pt(path):
        return ckpt_pt.load_ckpt_pt(path, dtype)
    if checkpoint.is_checkpoint(Path(path)):
        return _from_checkpoint(Path(path), dtype)
    offline = Path(path).is_dir() or not hub.is_reachable()
    try:
        where = {"local_files_only": offline, "trust_remote_code": False}
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True, **where)
    except pickle.UnpicklingError as error:
        raise ValueError(f"the model at {path} cannot be loaded: its file holds more than tensors, which would run as code") from error
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:  # by cause: no file, cut file, other shapes, other kind
        raise ValueError(f"the model at {path} cannot be loaded: {error}. {how_to_make}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the model at {path} lacks {len(missing)} tensors that its config.json calls for ({', '.join(missing[:3])}, ...): they "
            "would start at random values. The folder is incomplete, or its config.json belongs to another model"
        )
    return model


def _from_checkpoint(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model in a training state, its float32 master weights rounded to `dtype`, None for the run's."""
    try:
        facts = checkpoint.read_manifest(path)
        problem = next((found for name, file in facts["files"].items() if (found := checkpoint.file_problem(path, name, file))), None)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    saved = shards.Saved(path, facts["state"])
    dtype = dtype or getattr(torch, facts["recipe"]["dtype"])
    config = AutoConfig.from_pretrained(checkpoint.model_description(path), trust_remote_code=False)
    state = {name.removeprefix("model."): layers.as_saved(name, saved.parameter(name), config).to(dtype) for name in saved.shapes}
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def prepare_command(recipe: Recipe) -> str:
    """The command that makes the recipe's data for its model's tokenizer."""
    tokenizer = recipe.tokenizer or tokenizer_beside(recipe.model_path)
    return f"python data_prep/{PREPARE[type(recipe)]}{f' --tokenizer {tokenizer}' if tokenizer else ''} --output_dir {recipe.data_dir}"


def load_chat(recipe: Recipe, manifest: dict) -> ChatFormat:
    """The chat format of the data, with the recipe's tokenizer; else what lies beside the checkpoint; else the one that made the data.

    Raises ValueError unless it is the tokenizer, with the template, that the data was prepared with.
    """
    find_model(recipe.model_path, HOW_TO_MAKE[type(recipe)])
    place, template = (
        recipe.tokenizer or tokenizer_beside(recipe.model_path) or str(Path(recipe.data_dir) / "tokenizer"),
        manifest["template_name"],
    )
    chat = ChatFormat(tokenization.load_tokenizer(place, template), template)
    identity = {"tokenizer": tokenization.fingerprint(chat.tokenizer), "template": chat.hash}
    for what, value in identity.items():
        if manifest[what] != value:
            raise ValueError(
                f"{recipe.data_dir} was prepared with another {what} ({manifest[what]}) than this model's ({value}): its token ids would "
                "mean other words. Prepare the data again with --tokenizer naming the model's, or give --tokenizer here"
            )
    if isinstance(recipe, DPORecipe) and recipe.checks == "on" and not recipe.tokenizer and tokenizer_beside(recipe.model_path):
        _check_form(chat, recipe)
    return chat


def _check_form(chat: ChatFormat, recipe: Recipe) -> None:
    """Refuse preference data in another form of conversation than the one that the model's folder says it was taught."""
    try:
        own = ChatFormat(chat.tokenizer, "tokenizer")
    except ValueError:  # it has none, or none that a model could be trained on by this package
        return
    forms = [render_prompt(form, PROBE) for form in (chat, own)]
    if forms[0] != forms[1]:
        here, there = (repr(chat.tokenizer.decode(form)) for form in forms)
        raise ValueError(
            f"{recipe.data_dir} was prepared with another template than {recipe.model_path} was taught: a conversation reads\n    {here}\n"
            f"in the data and\n    {there}\nby the model's own template. Prepare the data again with --template tokenizer --tokenizer "
            f"{recipe.model_path}, or, if the data is right, go on with --checks=off"
        )


def tokenizer_beside(model_path: str) -> str | None:
    """The tokenizer that lies beside a checkpoint, if any."""
    if hub.is_hub_name(model_path):
        return model_path
    folder = Path(model_path).parent if ckpt_pt.is_ckpt_pt(model_path) else Path(model_path)
    if checkpoint.is_checkpoint(folder):
        folder = checkpoint.model_description(folder)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return str(folder)
    if (folder / "tokenizer.model").is_file():
        return str(folder / "tokenizer.model")
    return None


def load_policy(
    recipe: Recipe, tokenizer, device: torch.device, checkpoint_function=None, frozen: bool = False
) -> tuple["Policy", list[str]]:
    """The recipe's model as a Policy on the device, with its kernels chosen, and a line for each choice. All ranks."""
    dtype = getattr(torch, recipe.dtype)
    model = load_model(recipe.model_path, dtype, HOW_TO_MAKE[type(recipe)])
    choices = []
    if added := tokenization.grow_embeddings(model, tokenizer):
        choices.append(f"embeddings: {added} rows added for tokens that the checkpoint lacks, at the mean of the others")
    _set_dropout(model, recipe.dropout)
    if recipe.dropout:
        choices.append(f"dropout {recipe.dropout}: the curve depends on the layout of the run")
    weights = hash_weights(model)
    same_on_all_ranks("model", weights)
    if widened := layers.widen_feed_forward(model):
        choices.append(widened)
    model.to(device)
    name, reason = attention.choose(recipe.kernels, device, dtype, recipe.dropout, model.config)
    choices.append(f"attention: {name} ({reason})")
    choices.append(f"layers: {layers.choose(model, recipe.kernels, recipe.compile)}")
    policy = build_policy(model, name, recipe.checks == "on")
    choices.append(f"head: {policy.head.choose(recipe.kernels)}")
    policy.weights, policy.scale = weights, scale_of_weights(model)
    if not frozen:
        checkpoint_activations(model, recipe.activation_checkpointing, checkpoint_function)
    if recipe.compile:
        for layer in model.base_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    return policy, choices


def _set_dropout(model: PreTrainedModel, dropout: float) -> None:
    """Attention dropout, the only one that the known architectures have, as the recipe says and not as the checkpoint was trained."""
    if dropout and not hasattr(model.config, "attention_dropout"):
        raise ValueError(f"{type(model).__name__} has no attention dropout; set dropout: 0")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
        elif isinstance(module, nn.Dropout):
            module.p = 0.0


def build_policy(model: PreTrainedModel, attention_name: str, checks: bool) -> Policy:
    """Wrap the model. An architecture that is not in ARCHITECTURES must prove itself; with `checks` the known ones must, too."""
    known = type(model).__name__ in layers.ARCHITECTURES
    if sliding := _sliding_window(model.config):
        raise ValueError(
            f"{type(model).__name__} uses {sliding}, which packed attention does not do; known to work: {', '.join(layers.ARCHITECTURES)}"
        )
    if known and not checks:
        return Policy(model, attention_name)
    sample = [torch.arange(n) * 7919 % model.config.vocab_size for n in (5, 13, 8)]
    with torch.no_grad():
        plain = torch.cat([_plain_logps(model, ids) for ids in sample])
        if not plain.isfinite().all():
            raise ValueError(
                f"the {type(model).__name__} gives log-probs that are not finite: its weights are damaged, or its training diverged"
            )
        policy = Policy(model, attention_name)
        builder = RowBuilder()
        for ids in sample:
            builder.add_sequence(ids.tolist(), ids.tolist())
        packed = policy(builder.build().to(plain.device)).cpu()
    difference = (plain.cpu() - packed).abs().max().item()
    if not difference <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"{type(model).__name__}: the packed forward pass differs from transformers' own by {difference:.3g} nats a token "
            f"(limit {TOLERANCE[model.dtype]}). Its attention or head does something that packing does not reproduce, so it is refused; "
            f"known to work: {', '.join(layers.ARCHITECTURES)}"
        )
    return policy


def _sliding_window(config) -> str | None:
    """The kind of attention layer that looks back only so far, if the model has one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return next((kind for kind in kinds if kind != "full_attention"), None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return f"a sliding window of {window} tokens" if window else None


def _plain_logps(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of ids[1:] by transformers' own forward pass, without packing."""
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def checkpoint_activations(model: PreTrainedModel, mode: str, deepspeed_checkpoint=None) -> None:
    """Recompute activations in backward: whole layers (full, offload), or the feed-forward blocks, which hold most of them (selective).

    `deepspeed_checkpoint` is DeepSpeed's function, where its JSON section says how. Recomputing only what is cheap, by torch's selective
    contexts, is not possible under ZeRO-3: its gathering inside the recomputed region changes the sequence of operations (torch 2.13).
    """
    if mode in ("full", "offload"):
        function = deepspeed_checkpoint or partial(recompute, use_reentrant=False)
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    elif mode == "selective":
        for layer in model.base_model.layers:
            layer.mlp.forward = partial(recompute, layer.mlp.forward, use_reentrant=False)
