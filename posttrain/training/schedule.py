"""Computes a run's number of steps, and the learning rate of each, a pure function of the step."""

import math
from pathlib import Path

from posttrain.data import batches
from posttrain.recipes.keys import Recipe
from posttrain.recipes.reading import refuse_decay_in_warmup
from posttrain.run.stored import is_run, read_facts


def total_steps(recipe: Recipe, num_examples: int) -> int:
    """Return the run's number of optimizer steps: the recipe's max_iters, or as many as its epochs take."""
    if recipe.max_iters:
        return recipe.max_iters
    return math.ceil(recipe.epochs * batches.steps_per_epoch(num_examples, recipe.global_batch_size))


def with_warmup(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe of a run of `steps` steps with warmup_iters set where it gives warmup_ratio: a share, rounded up, of its steps.

    An existing run keeps the number that it was created with, so that extending it does not take its learning rate back into the warmup.
    Raises ValueError where lr_decay_iters lies within the warmup.
    """
    if recipe.warmup_ratio is None:
        return recipe
    run = Path(recipe.out_dir)
    share = min(math.ceil(recipe.warmup_ratio * steps), steps - 1)
    warmup = read_facts(run, "warmup_iters")["warmup_iters"] if is_run(run) else share
    recipe = recipe.model_copy(update={"warmup_iters": warmup})
    refuse_decay_in_warmup(recipe)
    return recipe


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (1-based): linear warmup, then from the peak along a cosine to min_lr.

    Step warmup_iters + 1 is the first at the peak; min_lr is reached after the step lr_decay_iters (default: the run's last).
    """
    if step <= recipe.warmup_iters:
        return recipe.learning_rate * step / (recipe.warmup_iters + 1)
    if not recipe.decay_lr:
        return recipe.learning_rate
    end = recipe.lr_decay_iters or total_steps
    if step > end:
        return recipe.min_lr
    progress = (step - 1 - recipe.warmup_iters) / (end - recipe.warmup_iters)
    return recipe.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (recipe.learning_rate - recipe.min_lr)
