"""Prints a run's first screen: what will happen, what looks wrong, and how long it will take."""

import time
from collections.abc import Iterator

import torch
from torch import distributed as dist

from posttrain.data import batches
from posttrain.objectives.losses import LOSSES
from posttrain.objectives.preference import DPO
from posttrain.operators.saved_form import count_as_saved
from posttrain.recipes.keys import DPORecipe, Recipe
from posttrain.run.directory import Run
from posttrain.training.state import Training

FEW_STEPS = 20  # fewer are hardly more than the warmup
SMALL_BATCH = 16  # examples a step, below which more steps are rarely better
MANY_EPOCHS = 4  # more passes over instruction data are usually memorised, not learned


def describe(training: Training, run: Run, steps: int, choices: list[tuple[str, str]]) -> None:
    """Print model, data, step, run, each of `choices` as (label, text), and warnings. Only rank 0 prints."""
    recipe, data, model = training.recipe, training.data, training.model
    passes = steps / batches.steps_per_epoch(len(data.train), recipe.global_batch_size)
    tokens, batch = data.train.lengths.mean(), recipe.global_batch_size
    lines = [
        ("model", f"{recipe.model_path}: {type(model).__name__}, {count_as_saved(model):,} parameters, {recipe.dtype}"),
        (
            "data",
            f"{recipe.data_dir}: {len(data.train):,} for training, {len(data.validation):,} for validation, mean {tokens:.0f} tokens",
        ),
        (
            "step",
            f"{batch} examples x {tokens:.0f} tokens = {batch * tokens:,.0f} tokens, on {dist.get_world_size()} ranks in micro-batches of "
            f"at most {training.max_tokens:,}",
        ),
        ("run", f"{steps} steps = {passes:.2f} passes over the data"),
        ("into", f"{run.path}/: checkpoints/, final/ (the model), metrics.jsonl, logs/; curves: tensorboard --logdir {run.path.parent}"),
        *choices,
        *(("window", text) for text in _windows(model.config.get_text_config(), data.longest)),
        *(("warning", text) for text in _warnings(recipe, steps, passes)),
    ]
    for label, text in lines:
        run.say(f"{label:10} {text}")


def _windows(config, longest: int) -> Iterator[str]:
    """Say how far layers look back that do not see the whole text, and whether that leaves anything out of an example."""
    kinds = getattr(config, "layer_types", None) or []
    for name, kind, what in (("sliding_window", "sliding_attention", "windows"), ("attention_chunk_size", "chunked_attention", "chunks")):
        size, layers = getattr(config, name, None), kinds.count(kind) if kinds else config.num_hidden_layers
        if not size or not layers or (not kinds and getattr(config, "use_sliding_window", True) is False):
            continue
        seen = f"the longest example has {longest:,}" if longest > size else "no example is longer, so they see all, as full attention does"
        yield f"{what} of {size:,} tokens in {layers} of {config.num_hidden_layers} layers: {seen}"


def _warnings(recipe: Recipe, steps: int, passes: float) -> Iterator[str]:
    """Yield a sentence for each setting that is allowed and seldom meant."""
    if recipe.checks == "off":
        yield (
            "checks=off: a wrong reference, dropout that is on, another chat template or a packing error of a known architecture would go "
            "unnoticed"
        )
    if isinstance(recipe, DPORecipe):
        least, most = LOSSES[recipe.loss].usual_beta
        if not least <= recipe.beta <= most:
            yield f"beta {recipe.beta:g} is outside the range usual for loss {recipe.loss}, {least:g} to {most:g}"
    if steps <= recipe.warmup_iters:
        yield f"warmup_iters {recipe.warmup_iters} is as long as the run: learning_rate {recipe.learning_rate:g} is never reached"
    if recipe.decay_lr and not recipe.min_lr and (end := recipe.lr_decay_iters or steps) < steps:
        yield (
            f"lr_decay_iters {end} is before the last step, {steps}, and min_lr is 0: the last {steps - end} steps are made at learning "
            "rate 0 and change nothing. Leave lr_decay_iters out, or set min_lr"
        )
    if recipe.lr_decay_iters and recipe.lr_decay_iters > steps:
        yield f"lr_decay_iters {recipe.lr_decay_iters} is after the last step, {steps}: the learning rate does not come down to min_lr"
    if recipe.epochs and steps < FEW_STEPS and recipe.global_batch_size > SMALL_BATCH:
        yield (
            f"{steps} steps are few, since a step takes {recipe.global_batch_size} examples: with so few rows a smaller global_batch_size "
            "usually learns more"
        )
    if passes > MANY_EPOCHS:
        yield f"{passes:.1f} passes over the data: more than {MANY_EPOCHS} usually memorise it; lower max_iters or epochs"


@torch.no_grad()
def expected_seconds(training: Training) -> float:
    """Estimate the seconds of a mean step from a timed forward pass: backward takes twice as long, plus recomputation. All ranks."""
    recipe, train = training.recipe, training.data.train
    batch = train.micro_batch(training.share(1).micro_batches[0]).to(training.device)
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
