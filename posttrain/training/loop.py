"""The training loop, the only one: SFT and DPO differ in their objective. What happens within a step is in step.py."""

import gc
import time

import psutil
import torch
from torch import distributed as dist

from posttrain.common.terminal import duration
from posttrain.data import batches
from posttrain.data.chat import ChatFormat
from posttrain.data.prepared import Split
from posttrain.engine import shards
from posttrain.engine.ds_config import read_ds_config
from posttrain.engine.optimizer import describe_optimizer, set_learning_rate
from posttrain.engine.weights import WeightSample, gathered_state_dict
from posttrain.model import export
from posttrain.operators.saved_form import count_as_saved
from posttrain.parallel import watchdog
from posttrain.parallel.ranks import on_rank_0
from posttrain.planning.memory import Layout, Zero
from posttrain.planning.memory import states as kept_states
from posttrain.recipes.keys import AUTO, Recipe
from posttrain.run.card import model_card
from posttrain.run.directory import Run
from posttrain.run.health import Facts
from posttrain.training import auto_batch
from posttrain.training.first_screen import describe, expected_seconds, total_steps
from posttrain.training.inputs import check_positions
from posttrain.training.replay import replay, shown_loss
from posttrain.training.samples import Samples
from posttrain.training.saving import Saving
from posttrain.training.schedule import learning_rate
from posttrain.training.start_checks import check_start
from posttrain.training.step import Training, evaluate, example_losses, step_share, train_step


def train(training: Training, chat: ChatFormat, run: Run, choices: list[str]) -> None:
    """Train to the recipe's last step, from the newest checkpoint where there is one, and write final/. All ranks."""
    if not run.recipe.only_looks:
        shards.make_optimizer_states(training.engine)
        if run.recipe.max_tokens_per_gpu == AUTO:
            auto_batch.adapt(training, run)
    recipe, engine, data = training.recipe, training.engine, training.data
    steps = total_steps(recipe, len(data.train))
    describe(recipe, data, run, engine.module.model, steps, [*choices, describe_optimizer(engine)])
    check_positions(data, engine.module.model.config)
    check_start(training)
    if not recipe.only_looks:
        run.say(f"time     about {duration(steps * expected_seconds(training))} for all steps, by a timed forward pass")
    keeper = Saving(training, run, steps)
    done = keeper.resume()
    if steps < done:
        raise ValueError(f"{run.path} has made {done} steps already, more than the {steps} of this command; it can only become longer")
    if recipe.replay_step:
        replay(training, run, done, steps)
        return
    if recipe.eval_only:
        if not len(data.validation):
            raise ValueError(f"eval_only: {recipe.data_dir} has no validation rows; prepare it with --val_size")
        run.say("  ".join(f"{name} {value:.4f}" for name, value in evaluate(training)[0].items()))
        return

    model = engine.module.model
    keeper.begin(done, export.written_bytes(model))
    facts = Facts(
        count_as_saved(model), len(data.train), data.manifest.get("copies", 0), engine.module.scale, float(data.train.answer_tokens.mean())
    )
    samples = Samples(recipe, data, chat)
    system_prompt = data.manifest["options"].get("system_prompt")
    exams = _exams(recipe, chat, system_prompt, model.config.max_position_embeddings)
    layout = Layout(Zero.of(read_ds_config(recipe.ds_config)), dist.get_world_size(), model.dtype, training.device.type == "cuda")
    run.start(
        done + 1,
        steps,
        describe_model=lambda folder: export.write_description(model, chat, folder, system_prompt),
        manifest=data.manifest,
        facts=facts,
        states=vars(kept_states(facts.parameters, layout)),
    )
    if not on_rank_0(lambda: run.has_looked(done)):
        _look(training, samples, exams, run, done, steps)  # before the first step, or where a stop left it out
    sample = WeightSample(engine) if recipe.dtype == "bfloat16" else None
    tokens = _tokens_before(recipe, data.train, done)
    gc.collect()
    gc.freeze()
    gc.disable()  # within a step a collection on one rank makes all others wait: they collect together, between steps
    for step in range(done + 1, steps + 1):
        started = time.perf_counter()
        gc.collect(1 if step % 100 else 2)
        lr = learning_rate(recipe, step, steps)
        set_learning_rate(engine, lr)
        before = sample.values() if sample else []
        metrics, reason = train_step(training, step)
        if sample and not reason:  # a step that was not applied changes none
            metrics["bf16_changed"] = sample.share_changed(before)
        step_tokens = int(data.train.lengths[step_share(training, step)[0]].sum())
        tokens += step_tokens
        seconds = time.perf_counter() - started
        metrics |= {
            "learning_rate": lr,
            "epoch": step / batches.steps_per_epoch(len(data.train), recipe.global_batch_size),
            "num_tokens": tokens,
            "step_ms": 1000 * seconds,
            "tokens_per_second": step_tokens / seconds,
            "memory_gb": _memory(training.device) / 1e9,
        }
        run.log(step, "train", metrics)
        run.step_line(step, metrics)
        if reason:
            _refused(training, run, keeper, step, reason, metrics)
        validation = None
        if step == steps or not training.counted["stop"]:  # a stop must not wait for it
            validation = _look(training, samples, exams, run, step, steps)
        if keeper.after(step, validation, time.perf_counter() - started):
            keeper.say_stopped(step)
            run.close()
            return
    finish(training, run)


def _is_due(interval: int, step: int, steps: int) -> bool:
    """Every `interval` steps, from step 0 on, and after the last one; never where it is 0."""
    return interval > 0 and (step % interval == 0 or step == steps)


def _exams(recipe: Recipe, chat: ChatFormat, system_prompt: str | None, context: int):
    """The recipe's benchmarks, if any: only then is lm_eval imported, which takes seconds. All ranks."""
    if not recipe.benchmarks:
        return None
    from posttrain.training.benchmarks import TrainingBenchmarks

    return TrainingBenchmarks(recipe, chat, system_prompt, context)


def _look(training: Training, samples: Samples, exams, run: Run, step: int, steps: int) -> float | None:
    """What is due after this step: validate where there is something to validate on, answer the fixed prompts, take the benchmarks.

    Returns the validation loss. All ranks.
    """
    recipe, started, metrics = training.recipe, time.perf_counter(), {}
    validates = _is_due(recipe.eval_interval, step, steps)
    if validates and len(training.data.validation):
        metrics, examples = evaluate(training)
        run.log_histograms(step, examples)
        run.eval_line(step, metrics)
    if validates and samples.prompts:
        answers = samples.ask(training)
        run.log_samples(step, answers)
        metrics["sample_tokens"] = sum(answer["tokens"] for answer in answers) / len(answers)
    if exams and _is_due(recipe.benchmark_interval or recipe.eval_interval, step, steps):
        metrics |= exams.take(training)
    if metrics:
        run.log(step, "eval", metrics | {"runtime": time.perf_counter() - started})
    return metrics.get("loss")


def _refused(training: Training, run: Run, keeper: Saving, step: int, reason: str, metrics: dict[str, float]) -> None:
    """Say and record that a step was not applied; stop the run where that happens too often. All ranks."""
    examples = example_losses(training, step)
    run.bad_batch(step, reason, metrics, examples)
    worst = examples[0]
    run.say(
        f"warning  step {step} was not applied: {reason}. Its worst example is {worst['index']} ({worst['source']}), loss "
        f"{shown_loss(worst['loss'])}; all are in {run.path}/bad_batches.jsonl"
    )
    if training.guard.must_stop:
        keeper.save_now(step)
        raise ValueError(
            f"{training.guard.bad_in_a_row} steps in a row were not applied, the last because {reason}. The newest checkpoint holds the "
            f"weights from before them, {run.path}/bad_batches.jsonl their examples; --replay_step={step} runs one again. The same command "
            "goes on after them; a new run with a lower --learning_rate or without these examples is what usually helps"
        )


def finish(training: Training, run: Run) -> None:
    """Write final/. All ranks."""
    watchdog.enter("export")
    state = gathered_state_dict(training.engine)

    def write():
        card = model_card(run.path, run.settled, training.data.manifest)
        export.write_model(state, run.path / "model", run.final, card)

    on_rank_0(write)
    run.finished()
    run.say(f"saved {run.final}")
    run.close()


def _memory(device: torch.device) -> float:
    """Bytes that this rank has taken at most; on a CPU those that it holds."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _tokens_before(recipe: Recipe, split: Split, done: int) -> int:
    """Tokens seen in steps 1 to `done`."""
    epochs, steps = divmod(done, batches.steps_per_epoch(len(split), recipe.global_batch_size))
    begun = batches.epoch_order(len(split), recipe.seed, epochs)[: steps * recipe.global_batch_size]
    return epochs * int(split.lengths.sum()) + int(split.lengths[begun].sum())
