"""Computes the learning rate, a pure function of the step."""

import math

from posttrain.recipes.keys import Recipe


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
