"""Checks a run's inputs: data, chat format and model must belong together, and code and inputs be the same on all ranks."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from posttrain.data import batches, tokenization
from posttrain.data.chat import ChatFormat, render_prompt
from posttrain.data.manifest import again
from posttrain.data.prepared import PreparedData, Split
from posttrain.engine.ds_config import read_ds_config
from posttrain.model.forms import find_model, source_of, tokenizer_beside
from posttrain.operators import positions
from posttrain.parallel.ranks import same_on_all_ranks
from posttrain.recipes.keys import AUTO, DPORecipe, Recipe

CODE = Path(__file__).parents[1]  # the whole package
PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "numpy")


def same_inputs_on_all_ranks(recipe: Recipe, prepared: PreparedData) -> None:
    """Raise unless all ranks run the same code on the same recipe, ds_config and data, down to the tokens of the first step. All ranks."""
    train = prepared.train
    first = train.micro_batch(batches.step_examples(len(train), recipe.global_batch_size, recipe.seed, 1))
    tokens = hashlib.sha256(first.input_ids.numpy().tobytes() + first.targets.numpy().tobytes()).hexdigest()
    parts = {f"code: posttrain/{name}": value for name, value in hashes_of_code(CODE).items()}
    parts |= {f"package: {name}": version(name) for name in PACKAGES}
    parts |= {f"recipe: {name}": str(value) for name, value in recipe.model_dump().items()} | {"plan version": str(batches.PLAN_VERSION)}
    if recipe.ds_config != AUTO:  # auto_layout compares the one that it chooses
        parts |= {f"content of {recipe.ds_config}": json.dumps(read_ds_config(recipe.ds_config), sort_keys=True)}
    parts |= {"data: manifest and lengths": prepared.fingerprint, "data: tokens": tokens}
    same_on_all_ranks("code, recipe or prepared data", parts)


def hashes_of_code(package: Path) -> dict[str, str]:
    """Return a hash of every Python file of a package, by its path in it."""
    return {str(file.relative_to(package)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(package.rglob("*.py"))}


PROBE = [{"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "two"), ("user", "three"))]


def load_chat(recipe: Recipe, manifest: dict) -> ChatFormat:
    """Return the data's chat format with the recipe's tokenizer, else the one beside the model, else the one stored with the data.

    Raises ValueError unless it is the tokenizer, with the template, that the data was prepared with.
    """
    source = source_of(recipe.model_path, recipe.out_dir)
    find_model(source, recipe.how_to_make_model)
    place, template = (
        recipe.tokenizer or tokenizer_beside(source) or str(Path(recipe.data_dir) / "tokenizer"),
        manifest["template_name"],
    )
    chat = ChatFormat(tokenization.load_tokenizer(place, template), template)
    chat.thinks = manifest.get("thinks", False)
    identity = {"tokenizer": tokenization.fingerprint(chat.tokenizer), "template": chat.hash}
    maker = manifest["options"].get("tokenizer", "its maker")
    for what, value in identity.items():
        if manifest[what] != value:
            raise ValueError(
                f"{recipe.data_dir} was prepared with another {what}, {maker}'s, than {place}'s: its token ids would mean other words. "
                f"Prepare the data again:\n    {again(manifest, f'{recipe.data_dir}_again', recipe.tokenizer or recipe.model_path)}"
            )
    if isinstance(recipe, DPORecipe) and recipe.checks == "on" and not recipe.tokenizer and tokenizer_beside(source):
        _check_template(chat, recipe)
    return chat


def _check_template(chat: ChatFormat, recipe: Recipe) -> None:
    """Raise ValueError if the data renders a conversation differently than the chat template in the model's own folder does."""
    try:
        own = ChatFormat(chat.tokenizer, "tokenizer")
    except ValueError:  # it has no template, or one that this package cannot train with
        return
    own.thinks = chat.thinks
    forms = [render_prompt(form, PROBE) for form in (chat, own)]
    if forms[0] != forms[1]:
        here, there = (repr(chat.tokenizer.decode(form)) for form in forms)
        raise ValueError(
            f"{recipe.data_dir} was prepared with another template than {recipe.model_path} was taught: a conversation reads\n    {here}\n"
            f"in the data and\n    {there}\nby the model's own template. Prepare the data again with --template tokenizer --tokenizer "
            f"{recipe.model_path}, or, if the data is right, go on with --checks=off"
        )


def check_positions(data: PreparedData, config) -> None:
    """Raise ValueError naming an example that the model cannot be given packed.

    It has more positions than the model was made for, which would extrapolate its position encoding, or it is a pair whose prompt would
    have other rotary frequencies with each answer. `config` is that of the part that reads text.
    """
    most = positions.longest_position(config)
    for name, split in (("training", data.train), ("validation", data.validation)):
        if not len(split):
            continue
        index = int(split.positions.argmax())
        which = f"{name} example {index} ({split[index]['source']}) has {split.positions[index]}"
        if most and split.positions[index] > most:
            raise ValueError(f"{which} positions, the model was made for at most {most}; prepare the data with --max_length {most}")
        if split.kind == "dpo" and split.share_prompt:
            _check_shared_prompts(name, split, config)


def _check_shared_prompts(name: str, split: Split, config) -> None:
    """Raise ValueError naming a pair whose answers, each alone with the prompt, would give it other rotary frequencies."""
    chosen, rejected = (split.token_counts("prompt") + split.token_counts(answer) for answer in ("chosen", "rejected"))
    if len(split_up := np.flatnonzero(positions.frequencies_differ(config, chosen, rejected))):
        index = int(split_up[0])
        raise ValueError(
            f"{name} example {index} ({split[index]['source']}) has {chosen[index]} positions with its chosen answer and {rejected[index]} "
            f"with the rejected one: beyond {positions.same_frequencies_until(config)} the model's rotary frequencies depend on a row's "
            f"length, so the two cannot share their prompt. Set share_prompt: False ({len(split_up):,} such pairs)"
        )


def check_lengths(data: PreparedData, max_tokens: int) -> None:
    """Raise ValueError naming an example that no micro-batch of `max_tokens` tokens can hold."""
    for name, split in (("training", data.train), ("validation", data.validation)):
        if len(split) and split.lengths.max() > max_tokens:
            index = int(split.lengths.argmax())
            raise ValueError(
                f"{name} example {index} ({split[index]['source']}) has {split.lengths[index]} tokens, more than "
                f"max_tokens_per_gpu={max_tokens}; raise it, or prepare the data with a smaller --max_length"
            )
