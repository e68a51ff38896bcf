"""What posttrain/sft.py and posttrain/dpo.py do: read the recipe, look for what is missing, and train."""

import sys

from posttrain.parallel.launched import read_launch
from posttrain.recipes.keys import Recipe
from posttrain.recipes.reading import load_recipe_of
from posttrain.training.missing import refuse_missing


def sft() -> None:
    """Do SFT by the recipe of the command line, on this rank."""
    _train(load_recipe_of("sft", sys.argv[1:]))


def dpo() -> None:
    """Do DPO by the recipe of the command line, on this rank."""
    _train(load_recipe_of("dpo", sys.argv[1:]))


def _train(recipe: Recipe) -> None:
    """Train by the recipe. Raises ValueError or FileNotFoundError for what is missing or does not belong together."""
    read_launch()
    refuse_missing(recipe)
    from posttrain.training.run_recipe import run_recipe  # only now: it imports torch, transformers and DeepSpeed, which takes seconds

    run_recipe(recipe)
