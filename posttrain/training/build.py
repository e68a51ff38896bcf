"""Builds what a run trains with from its recipe: data and chat format, models in their engines, and the objective."""

from typing import NamedTuple

import torch

from posttrain.data.chat import ChatFormat
from posttrain.data.prepared import PreparedData, load_prepared
from posttrain.data.row_checks import check_rows
from posttrain.engine.build import build_engine, build_reference, is_sharded
from posttrain.engine.cpu_adam import load_cpu_adam
from posttrain.engine.ds_config import REFERENCE, checkpoint_function, offloads_optimizer, read_ds_config
from posttrain.model.policy import load_policy
from posttrain.objectives.likelihood import SFT
from posttrain.objectives.preference import DPO
from posttrain.recipes.keys import AUTO, DPORecipe, Recipe
from posttrain.training import reference
from posttrain.training.auto_batch import tokens_to_begin_with
from posttrain.training.inputs import check_positions, load_chat
from posttrain.training.missing import prepare_command
from posttrain.training.schedule import total_steps, with_warmup
from posttrain.training.state import Training


class Inputs(NamedTuple):
    """What a run reads besides the model."""

    data: PreparedData
    chat: ChatFormat


def read_inputs(recipe: Recipe) -> Inputs:
    """Read the recipe's ds_config, prepared data and chat format, and the compiled code that they need; needs no other rank.

    Raises ValueError or FileNotFoundError for what is missing, damaged, or does not belong together.
    """
    offloads = recipe.ds_config != AUTO and offloads_optimizer(read_ds_config(recipe.ds_config))
    shares_prompt = not isinstance(recipe, DPORecipe) or recipe.share_prompt
    data = load_prepared(recipe.data_dir, recipe.kind, prepare_command(recipe), shares_prompt)
    inputs = Inputs(data, load_chat(recipe, data.manifest))
    check_rows(data, recipe.data_dir, len(inputs.chat.tokenizer))
    if offloads:
        load_cpu_adam()
    return inputs


def build_training(recipe: Recipe, inputs: Inputs, device: torch.device) -> tuple[Training, list[tuple[str, str]]]:
    """Load the models, wrap them in engines, and return the Training that every step works on; the recipe's layout is settled. All ranks.

    Also returns what was chosen on the way (kernels, the reference), as (label, text), for the first screen.
    """
    data, tokenizer = inputs.data, inputs.chat.tokenizer
    recipe = with_warmup(recipe, total_steps(recipe, len(data.train)))
    ds_config = read_ds_config(recipe.ds_config)
    if offloads_optimizer(ds_config):
        load_cpu_adam()
    max_tokens = tokens_to_begin_with(recipe, data, device)

    def frozen():
        """Load the reference in its engine."""
        policy, _ = load_policy(recipe, tokenizer, device, sharded=is_sharded(read_ds_config(REFERENCE)), frozen=True)
        return build_reference(policy, recipe)

    compares = isinstance(recipe, DPORecipe) and recipe.needs_reference
    precomputes = (
        compares and recipe.reference == "precompute" and not recipe.only_looks
    )  # eval_only and replay_step write nothing, not even beside the data
    beside = frozen() if compares and not precomputes else None
    recompute = checkpoint_function(recipe, ds_config)
    policy, choices = load_policy(recipe, tokenizer, device, sharded=is_sharded(ds_config), checkpoint_function=recompute)
    check_positions(data, policy.model.config.get_text_config())
    if precomputes:
        choices.append(("reference", reference.attach(recipe, max_tokens, data, policy.fingerprint, device, frozen)))
    engine = build_engine(policy, recipe, ds_config)
    objective = DPO(engine, beside, **recipe.objective) if isinstance(recipe, DPORecipe) else SFT(engine)
    return Training(recipe, max_tokens, engine, data, objective), choices
