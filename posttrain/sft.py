"""Supervised fine-tuning of a base model on conversations.

deepspeed --num_gpus 8 posttrain/sft.py [RECIPE.yaml] [--key=value ...]
python posttrain/sft.py ...                  the same on one device; --help lists every key
"""

import sys

from posttrain.common.terminal import keep_noise
from posttrain.engine.start import check_versions, launch_shape, start_distributed
from posttrain.parallel.script import run_script
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import load_recipe
from posttrain.run.directory import Run
from posttrain.run.resume import already_finished, resolve
from posttrain.training.build import build_training, read_inputs
from posttrain.training.inputs import same_inputs_on_all_ranks
from posttrain.training.loop import train


def sft() -> None:
    """Train by the recipe of the command line, on this rank."""
    check_versions()
    rank, world_size = launch_shape()
    recipe = resolve(load_recipe(SFTRecipe, "sft_qwen3_1.8b", sys.argv[1:]), world_size)
    if already_finished(recipe, rank):
        return
    keep_noise()
    inputs = read_inputs(recipe)
    device = start_distributed(recipe.watchdog_seconds)
    same_inputs_on_all_ranks(recipe, inputs.data, inputs.ds_config)
    training, choices = build_training(recipe, inputs, device)
    run = Run(training.recipe, rank, {"data": inputs.data.fingerprint, "model": training.engine.module.fingerprint})
    train(training, inputs.chat, run, choices)


if __name__ == "__main__":
    run_script(sft)
