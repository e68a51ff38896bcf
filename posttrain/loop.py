"""The training loop, the only one: SFT and DPO differ in their objective. What happens within a step is in step.py."""

import gc
import math
import time

import psutil
import torch
from torch import distributed as dist

from posttrain import batches, checks, export, fit, shards, watchdog
from posttrain import engine as engines
from posttrain.card import model_card
from posttrain.chat import ChatFormat
from posttrain.config import AUTO, DPORecipe, Recipe
from posttrain.data import PreparedData, Split
from posttrain.health import Facts
from posttrain.keeper import Keeper
from posttrain.layers import count_as_saved
from posttrain.losses import LOSSES
from posttrain.objectives import DPO
from posttrain.ranks import on_rank_0
from posttrain.run import Run
from posttrain.samples import Samples
from posttrain.schedule import learning_rate
from posttrain.step import Training, evaluate, example_losses, step_share, train_step
from posttrain.terminal import duration

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


def train(training: Training, chat: ChatFormat, run: Run, choices: list[str]) -> None:
    """Train to the recipe's last step, from the newest checkpoint where there is one, and write final/. All ranks."""
    if not run.recipe.only_looks:
        shards.make_optimizer_states(training.engine)
        if run.recipe.max_tokens_per_gpu == AUTO:
            fit.adapt(training, run)
    recipe, engine, data = training.recipe, training.engine, training.data
    steps = total_steps(recipe, len(data.train))
    describe(recipe, data, run, engine.module.model, steps, [*choices, engines.describe_optimizer(engine)])
    _check_positions(data, engine.module.model.config)
    check_start(training)
    if not recipe.only_looks:
        run.say(f"time     about {duration(steps * expected_seconds(training))} for all steps, by a timed forward pass")
    keeper = Keeper(training, run, steps)
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
    run.start(done + 1, steps, lambda folder: export.write_description(model, chat, folder, system_prompt), data.manifest, facts)
    if not on_rank_0(lambda: run.has_looked(done)):
        _look(training, samples, exams, run, done, steps)  # before the first step, or where a stop left it out
    sample = engines.WeightSample(engine) if recipe.dtype == "bfloat16" else None
    tokens = _tokens_before(recipe, data.train, done)
    gc.collect()
    gc.freeze()
    gc.disable()  # within a step a collection on one rank makes all others wait: they collect together, between steps
    for step in range(done + 1, steps + 1):
        started = time.perf_counter()
        gc.collect(1 if step % 100 else 2)
        lr = learning_rate(recipe, step, steps)
        engines.set_learning_rate(engine, lr)
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
    from posttrain.exams import Exams

    return Exams(recipe, chat, system_prompt, context)


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


def _refused(training: Training, run: Run, keeper: Keeper, step: int, reason: str, metrics: dict[str, float]) -> None:
    """Say and record that a step was not applied; stop the run where that happens too often. All ranks."""
    examples = example_losses(training, step)
    run.bad_batch(step, reason, metrics, examples)
    worst = examples[0]
    run.say(
        f"warning  step {step} was not applied: {reason}. Its worst example is {worst['index']} ({worst['source']}), loss "
        f"{_shown(worst['loss'])}; all are in {run.path}/bad_batches.jsonl"
    )
    if training.guard.must_stop:
        keeper.save_now(step)
        raise ValueError(
            f"{training.guard.bad_in_a_row} steps in a row were not applied, the last because {reason}. The newest checkpoint holds the "
            f"weights from before them, {run.path}/bad_batches.jsonl their examples; --replay_step={step} runs one again. The same command "
            "goes on after them; a new run with a lower --learning_rate or without these examples is what usually helps"
        )


def replay(training: Training, run: Run, done: int, steps: int) -> None:
    """Forward and backward of one step's batch alone, with the weights after step `done`; prints, and changes nothing. All ranks."""
    step = training.recipe.replay_step
    if step > steps:
        raise ValueError(f"replay_step {step} is after the run's last step, {steps}")
    metrics, reason = train_step(training, step, apply=False)
    weights = f"the checkpoint of step {done}" if done else "the model that the run began with"
    run.say(f"replay of step {step} with the weights of {weights}: loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}")
    run.say(f"it would not be applied: {reason}" if reason else "it would be applied: both are finite, and no spike")
    for example in example_losses(training, step):
        note = "" if example["weight"] else "  (weight 0: in the run's largest micro-batch, which step 1 tries)"
        numbers = f"{example['tokens']:>6} tokens  loss {_shown(example['loss']):>10}"
        run.say(f"  example {example['index']:>8}  {numbers}  {example['source']}{note}")


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def finish(training: Training, run: Run) -> None:
    """Write final/. All ranks."""
    watchdog.enter("export")
    state = engines.gathered_state_dict(training.engine)

    def write():
        card = model_card(run.path, run.settled, training.data.manifest)
        export.write_model(state, run.path / "model", run.final, card)

    on_rank_0(write)
    run.finished()
    run.say(f"saved {run.final}")
    run.close()


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


def _memory(device: torch.device) -> float:
    """Bytes that this rank has taken at most; on a CPU those that it holds."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _check_positions(data: PreparedData, config) -> None:
    """Refuse an example with more positions than the model was made for: its position encoding would be extrapolated."""
    most = getattr(config, "max_position_embeddings", None)
    for name, split in (("training", data.train), ("validation", data.validation)):
        if most and len(split) and split.positions.max() > most:
            index = int(split.positions.argmax())
            raise ValueError(
                f"{name} example {index} ({split.table[index]['source']}) has {split.positions[index]} positions, the model was made for "
                f"at most {most}; prepare the data with --max_length {most}"
            )


def check_start(training: Training) -> dict[str, float]:
    """Stop a run that would be wrong from its first step on; returns what was measured. All ranks."""
    recipe, objective, train = training.recipe, training.objective, training.data.train
    if recipe.checks == "off":
        return {}
    _, mine = step_share(training, 1)
    batch, dtype = train.micro_batch(mine[0]).to(training.device), getattr(torch, recipe.dtype)
    measured = {}
    if not recipe.dropout:
        measured["repeated forward"] = checks.forward_is_repeatable(objective.policy, batch, dtype)
    if isinstance(objective, DPO) and objective.has_reference:
        measured["policy and reference"] = checks.policy_equals_reference(objective, batch, dtype, train.reference_folder)
    return measured


def _tokens_before(recipe: Recipe, split: Split, done: int) -> int:
    """Tokens seen in steps 1 to `done`."""
    epochs, steps = divmod(done, batches.steps_per_epoch(len(split), recipe.global_batch_size))
    begun = batches.epoch_order(len(split), recipe.seed, epochs)[: steps * recipe.global_batch_size]
    return epochs * int(split.lengths.sum()) + int(split.lengths[begun].sum())
