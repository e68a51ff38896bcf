"""The first screen of a run: what will happen, and how long it is likely to take."""

import math
import time

import torch
from torch import distributed as dist

from posttrain.data import batches
from posttrain.data.prepared import PreparedData
from posttrain.objectives.losses import LOSSES
from posttrain.objectives.preference import DPO
from posttrain.operators.saved_form import count_as_saved
from posttrain.recipes.keys import DPORecipe, Recipe
from posttrain.run.directory import Run
from posttrain.training.step import Training, step_share

MANY_EPOCHS = 4  # more passes over instruction data are usually memorised, not learned


def total_steps(recipe: Recipe, num_examples: int) -> int:
    if recipe.max_iters:
        return recipe.max_iters
    return math.ceil(recipe.epochs * batches.steps_per_epoch(num_examples, recipe.global_batch_size))


def describe(recipe: Recipe, data: PreparedData, run: Run, model, steps: int, choices: list[str]) -> None:
    """The first screen: what will happen."""
    passes = steps / batches.steps_per_epoch(len(data.train), recipe.global_batch_size)
    tokens = data.train.lengths.mean()
    run.say(f"model    {recipe.model_path}: {type(model).__name__}, {count_as_saved(model):,} parameters, {recipe.dtype}")
    run.say(
        f"data     {recipe.data_dir}: {len(data.train):,} for training, {len(data.validation):,} for validation, mean {tokens:.0f} tokens"
    )
    run.say(
        f"step     {recipe.global_batch_size} examples x {tokens:.0f} tokens = {recipe.global_batch_size * tokens:,.0f} tokens, "
        f"on {dist.get_world_size()} ranks in micro-batches of at most {recipe.max_tokens_per_gpu:,}"
    )
    run.say(f"run      {steps} steps = {passes:.2f} passes over the data")
    run.say(f"into     {run.path}/: checkpoints/, final/ (the model), metrics.jsonl, logs/; curves: tensorboard --logdir {run.path.parent}")
    for choice in choices:
        run.say(f"kernel   {choice}")
    if recipe.checks == "off":
        run.say(
            "warning  checks=off: a wrong reference, dropout that is on, another chat template or a packing error of a known architecture "
            "would go unnoticed"
        )
    if isinstance(recipe, DPORecipe):
        least, most = LOSSES[recipe.loss].usual_beta
        if not least <= recipe.beta <= most:
            run.say(f"warning  beta {recipe.beta:g} is far from what loss {recipe.loss} is used with, {least:g} to {most:g}")
    if steps <= recipe.warmup_iters:
        run.say(
            f"warning  warmup_iters {recipe.warmup_iters} is longer than the run: learning_rate {recipe.learning_rate:g} is never reached"
        )
    if passes > MANY_EPOCHS:
        run.say(f"warning  {passes:.1f} passes over the data: more than {MANY_EPOCHS} usually memorise it; lower max_iters or epochs")


@torch.no_grad()
def expected_seconds(training: Training) -> float:
    """Of a mean step, by the time of one forward pass; a backward pass takes two, and what is recomputed comes on top. All ranks."""
    recipe, train = training.recipe, training.data.train
    _, mine = step_share(training, 1)
    batch = train.micro_batch(mine[0]).to(training.device)
    times = []
    training.engine.eval()
    for _ in range(2):  # the first may compile
        started = time.perf_counter()
        training.engine(batch)
        if training.device.type == "cuda":
            torch.cuda.synchronize(training.device)
        times.append(time.perf_counter() - started)
    training.engine.train()
    passes = 3 + {"none": 0, "selective": 0.6}.get(recipe.activation_checkpointing, 1)
    passes += isinstance(training.objective, DPO) and training.objective.reference is not None
    tokens = train.lengths.mean() * recipe.global_batch_size / dist.get_world_size()
    return passes * min(times) * tokens / batch.input_ids.shape[1]
