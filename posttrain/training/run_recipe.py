"""Trains by a recipe, on every rank: the stages of a run, of SFT and of DPO alike."""

from posttrain.common.terminal import keep_noise
from posttrain.engine.start import check_versions, start_distributed
from posttrain.parallel.launched import read_launch
from posttrain.recipes.keys import Recipe
from posttrain.run.directory import Run
from posttrain.run.resume import already_finished, resolve
from posttrain.training import auto_layout
from posttrain.training.build import build_training, read_inputs
from posttrain.training.inputs import same_inputs_on_all_ranks
from posttrain.training.loop import train


def run_recipe(recipe: Recipe) -> None:
    """Train by the recipe, on this rank; or continue the run that out_dir holds. All ranks."""
    check_versions()
    here = read_launch()
    recipe = resolve(recipe, here.world_size)
    if already_finished(recipe, here.rank):
        return
    keep_noise()
    inputs = read_inputs(recipe)
    device = start_distributed(recipe.watchdog_seconds)
    same_inputs_on_all_ranks(recipe, inputs.data)
    training, choices = build_training(recipe, inputs, device)
    run = Run(training.recipe, here.rank, {"data": inputs.data.fingerprint, "model": training.engine.module.fingerprint})
    if auto_layout.is_asked(recipe):
        run.keep_layout(recipe, auto_layout.record(recipe, training.recipe, device))
    train(training, inputs.chat, run, choices)
