"""Trains by a recipe, on every rank: the stages of a run, of SFT and of DPO alike."""

import torch

from posttrain.common.errors import first_line
from posttrain.common.terminal import keep_noise
from posttrain.engine.devices import look_at_gpus
from posttrain.engine.start import check_versions, start_distributed
from posttrain.model import own_code
from posttrain.model.forms import source_of
from posttrain.parallel.launched import read_launch
from posttrain.recipes.keys import Recipe
from posttrain.run.directory import Run
from posttrain.run.resume import already_finished, resolve
from posttrain.training import auto_layout
from posttrain.training.build import Inputs, build_training, read_inputs
from posttrain.training.inputs import same_inputs_on_all_ranks
from posttrain.training.loop import train
from posttrain.training.out_of_memory import is_out_of_memory, too_little_memory


def run_recipe(recipe: Recipe) -> None:
    """Train by the recipe, on this rank; or continue the run that out_dir holds. All ranks."""
    check_versions()
    here = read_launch()
    recipe = resolve(recipe, here.world_size)
    if already_finished(recipe, here.rank):
        return
    keep_noise()
    code = own_code.register(source_of(recipe.model_path, recipe.out_dir)) if recipe.trust_remote_code else None
    inputs = read_inputs(recipe)
    device = start_distributed(recipe.watchdog_seconds, recipe.deterministic)
    same_inputs_on_all_ranks(recipe, inputs.data)
    look_at_gpus(device, recipe.checks)
    settled, said = auto_layout.settle(recipe, inputs.data, device)
    try:
        _train(recipe, settled, [*said, *([("code", code)] if code else [])], inputs, device)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            # not a mistake of the user's, after which --max_restarts would not start again: another process may have taken the memory
            raise OSError(too_little_memory(error, settled, inputs.data.longest)) from error
        if "deterministic" in str(error) and recipe.deterministic:
            raise ValueError(f"deterministic: True is not possible with this model here: {first_line(error)}") from error
        raise


def _train(recipe: Recipe, settled: Recipe, said: list[tuple[str, str]], inputs: Inputs, device: torch.device) -> None:
    """Train by `settled`, the recipe with its layout; `said`: what the first screen says of that. All ranks."""
    training, choices = build_training(settled, inputs, device)
    run = Run(training.recipe, read_launch().rank, {"data": inputs.data.fingerprint, "model": training.engine.module.fingerprint})
    if auto_layout.is_asked(recipe):
        run.keep_layout(recipe, auto_layout.record(recipe, settled, device))
    if torch.are_deterministic_algorithms_enabled():
        choices.append(("kernel", "algorithms that add up in the same order each time, and no others (deterministic: True)"))
    train(training, inputs.chat, run, [*said, *choices])
