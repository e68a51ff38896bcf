"""The training loop of SFT and DPO, which differ only in their objective. What happens within a step is in step.py."""

import gc
import time
from pathlib import Path

import psutil
import torch
from torch import distributed as dist

from posttrain.common.terminal import duration
from posttrain.data import batches
from posttrain.data.chat import ChatFormat
from posttrain.data.prepared import Split
from posttrain.engine import shards
from posttrain.engine.ds_config import read_ds_config
from posttrain.engine.weights import WeightSample, gathered_state_dict
from posttrain.model import export
from posttrain.operators.saved_form import count_as_saved
from posttrain.parallel import watchdog
from posttrain.parallel.ranks import on_rank_0
from posttrain.planning import memory
from posttrain.recipes.keys import AUTO, Recipe
from posttrain.run.card import model_card
from posttrain.run.directory import Run
from posttrain.run.health import Facts
from posttrain.training import auto_batch
from posttrain.training.first_screen import describe, expected_seconds
from posttrain.training.replay import replay, shown_loss
from posttrain.training.saving import Saving
from posttrain.training.schedule import learning_rate, total_steps
from posttrain.training.start_checks import check_start
from posttrain.training.state import Training
from posttrain.training.step import StepResult, example_losses, sampled_logps, train_step
from posttrain.training.validation import Validation, validate_only
from posttrain.training.what_next import tell_what_next


def train(training: Training, chat: ChatFormat, run: Run, choices: list[tuple[str, str]]) -> None:
    """Train to the recipe's last step, from the newest checkpoint if there is one, and write final/. All ranks.

    With eval_only or replay_step it does only that. `choices`: what was chosen before (kernels, the reference), as (label, text), for the
    first screen.
    """
    recipe, steps = training.recipe, total_steps(training.recipe, len(training.data.train))
    if not recipe.only_looks:
        shards.make_optimizer_states(training.engine)
        if recipe.max_tokens_per_gpu == AUTO:
            auto_batch.adapt(training, run)
    describe(training, run, steps, [*choices, ("optimizer", training.engine.optimizer_said)])
    check_start(training)
    if not recipe.only_looks:
        run.say(f"time       about {duration(steps * expected_seconds(training))} for all steps, by a timed forward pass")
    saving = Saving(training, run, steps)
    done = saving.resume()
    if steps < done:
        raise ValueError(f"{run.path} has made {done} steps already, more than the {steps} of this command; it can only become longer")
    if recipe.replay_step:
        replay(training, run, done, steps)
    elif recipe.eval_only:
        validate_only(training, run)
    else:
        validation = _start(training, chat, run, saving, done)
        if _run_steps(training, run, saving, validation, done):
            finish(training, chat, run)


def _start(training: Training, chat: ChatFormat, run: Run, saving: Saving, done: int) -> Validation:
    """Check the room for checkpoints, open the logs, and validate the model as it is, unless that was done before a stop. All ranks."""
    model, data, steps = training.model, training.data, saving.steps
    saving.begin(done, export.written_bytes(model))
    facts = Facts(
        parameters=count_as_saved(model),
        rows=len(data.train),
        copies=data.manifest.get("copies", 0),
        weight_scale=training.engine.module.scale,
        answer_tokens=float(data.train.answer_tokens.mean()),
        vocabulary=model.config.get_text_config().vocab_size,
    )
    zero = memory.Zero.of(read_ds_config(training.recipe.ds_config))
    layout = memory.Layout(zero, dist.get_world_size(), model.dtype, training.device.type == "cuda")
    validation = Validation(training, chat, run, steps)
    run.start(
        done + 1,
        steps,
        describe_model=lambda folder: export.write_description(model, chat, folder, data.system_prompt),
        manifest=data.manifest,
        facts=facts,
        states=vars(memory.states(facts.parameters, layout)),
    )
    if not on_rank_0(lambda: run.has_looked(done)):
        validation.after(done)
    return validation


def _run_steps(training: Training, run: Run, saving: Saving, validation: Validation, done: int) -> bool:
    """Make the steps after `done`; returns True at the run's end, False if it was stopped and saved before. All ranks."""
    recipe, engine, train, steps = training.recipe, training.engine, training.data.train, saving.steps
    sample = WeightSample(engine) if recipe.dtype == "bfloat16" else None
    tokens = _tokens_before(recipe, train, done)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection within a step makes all other ranks wait: all collect at the same time, between steps
    for step in range(done + 1, steps + 1):
        started = time.perf_counter()
        gc.collect(1 if step % 100 else 2)
        lr = learning_rate(recipe, step, steps)
        engine.set_learning_rate(lr)
        before = sample.values() if sample else []
        result = train_step(training, step, saving.questions)
        metrics = result.metrics
        if sample and not result.refused:  # a step that was not applied changes no weight
            metrics["bf16_changed"] = sample.share_changed(before)
        tokens += result.tokens
        seconds = time.perf_counter() - started
        metrics |= {
            "learning_rate": lr,
            "epoch": step / batches.steps_per_epoch(len(train), recipe.global_batch_size),
            "num_tokens": tokens,
            "step_ms": 1000 * seconds,
            "tokens_per_second": result.tokens / seconds,
            "memory_gb": _memory(training.device) / 1e9,
        }
        run.log(step, "train", metrics)
        run.step_line(step, metrics)
        if result.refused:
            _record_refused(training, run, saving, step, result)
        must_stop = result.yes["stop"] and step < steps  # a stop must not wait for a validation
        loss = None if must_stop else validation.after(step)
        saving.after(step, result.yes, loss, time.perf_counter() - started)
        if must_stop:
            saving.say_stopped(step)
            run.close()
            return False
    return True


def _record_refused(training: Training, run: Run, saving: Saving, step: int, result: StepResult) -> None:
    """Print that a step was not applied, and record its examples; raise ValueError if too many follow each other. All ranks."""
    examples = example_losses(training, step)
    run.bad_batch(step, result.refused, result.metrics, examples)
    worst = examples[0]
    run.say(
        f"warning  step {step} was not applied: {result.refused}. Its worst example is {worst['index']} ({worst['source']}), loss "
        f"{shown_loss(worst['loss'])}; all are in {run.path}/bad_batches.jsonl"
    )
    if training.guard.must_stop:
        saving.save_now(step)
        raise ValueError(
            f"{training.guard.bad_in_a_row} steps in a row were not applied, the last because {result.refused}. The newest checkpoint "
            f"holds the weights from before them, {run.path}/bad_batches.jsonl their examples; --replay_step={step} runs one again. The "
            "same command goes on after them; what usually helps is a new run with a lower --learning_rate or without these examples"
        )


def finish(training: Training, chat: ChatFormat, run: Run) -> None:
    """Write final/, the run's result. All ranks."""
    watchdog.enter("export")
    expected = sampled_logps(training) if training.recipe.checks == "on" else None
    state = gathered_state_dict(training.engine)

    def write():
        card, notes = model_card(run.path, run.as_resolved, training.data.manifest), []

        def describe(folder: Path) -> None:
            notes.extend(export.write_description(training.model, chat, folder, training.data.system_prompt))

        unseen = export.write_model(training.model, state, describe, run.final, card, expected)
        for note in [*notes, *filter(None, [unseen])]:
            run.say(f"note       {note}")

    on_rank_0(write)
    run.finished()
    run.say(f"saved {run.final}")
    tell_what_next(run, training.data.manifest["template_name"])
    run.close()


def _memory(device: torch.device) -> float:
    """Return the most GPU memory that this rank has reserved, or on a CPU the memory that it holds now, in bytes."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _tokens_before(recipe: Recipe, split: Split, done: int) -> int:
    """Return how many tokens steps 1 to `done` have trained on."""
    epochs, steps = divmod(done, batches.steps_per_epoch(len(split), recipe.global_batch_size))
    begun = batches.epoch_order(len(split), recipe.seed, epochs)[: steps * recipe.global_batch_size]
    return epochs * int(split.lengths.sum()) + int(split.lengths[begun].sum())
