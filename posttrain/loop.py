"""The training loop, the only one: SFT and DPO differ in their objective.

The one invariant: a step's loss is divided by the totals of the whole step, which every rank computes from the plan. So the curve does
not depend on ranks, micro-batches or ZeRO stage.
"""

import hashlib
import math
import time

import numpy as np
import torch
from torch import distributed as dist

from posttrain import batches, checkpoint, checks
from posttrain import engine as engines
from posttrain import policy as policies
from posttrain.chat import ChatFormat
from posttrain.config import Recipe
from posttrain.data import PreparedData, Split
from posttrain.objectives import DPO, SFT
from posttrain.run import Run
from posttrain.schedule import learning_rate

MANY_EPOCHS = 4  # more passes over instruction data are usually memorised, not learned


def total_steps(recipe: Recipe, num_examples: int) -> int:
    if recipe.max_iters:
        return recipe.max_iters
    return math.ceil(recipe.epochs * batches.steps_per_epoch(num_examples, recipe.global_batch_size))


def check_lengths(recipe: Recipe, data: PreparedData) -> None:
    """Refuse an example that no micro-batch could hold, naming it."""
    for name, split in (("training", data.train), ("validation", data.validation)):
        if len(split) and split.lengths.max() > recipe.max_tokens_per_gpu:
            index = int(split.lengths.argmax())
            raise ValueError(
                f"{name} example {index} ({split.table[index]['source']}) has {split.lengths[index]} tokens, more than "
                f"max_tokens_per_gpu={recipe.max_tokens_per_gpu}; raise it, or prepare the data with a smaller --max_length"
            )


def describe(recipe: Recipe, data: PreparedData, run: Run, model, steps: int, choices: list[str]) -> None:
    """The first screen: what will happen."""
    passes = steps / batches.steps_per_epoch(len(data.train), recipe.global_batch_size)
    tokens = data.train.lengths.mean()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    run.say(f"model    {recipe.model_path}: {type(model).__name__}, {parameters:,} parameters, {recipe.dtype}")
    run.say(
        f"data     {recipe.data_dir}: {len(data.train):,} for training, {len(data.validation):,} for validation, mean {tokens:.0f} tokens"
    )
    run.say(
        f"step     {recipe.global_batch_size} examples x {tokens:.0f} tokens = {recipe.global_batch_size * tokens:,.0f} tokens, "
        f"on {dist.get_world_size()} ranks in micro-batches of at most {recipe.max_tokens_per_gpu:,}"
    )
    run.say(f"run      {steps} steps = {passes:.2f} passes over the data, into {run.path}")
    for choice in choices:
        run.say(f"kernel   {choice}")
    if recipe.checks == "off":
        run.say("warning  checks=off: a wrong reference, differing ranks or a packing error would go unnoticed")
    if steps <= recipe.warmup_iters:
        run.say(
            f"warning  warmup_iters {recipe.warmup_iters} is longer than the run: learning_rate {recipe.learning_rate:g} is never reached"
        )
    if passes > MANY_EPOCHS:
        run.say(f"warning  {passes:.1f} passes over the data: more than {MANY_EPOCHS} usually memorise it; lower max_iters or epochs")


def train(recipe: Recipe, engine, data: PreparedData, objective: SFT | DPO, chat: ChatFormat, run: Run, choices: list[str]) -> None:
    """Train to the recipe's last step, from the newest checkpoint where there is one, and write final/. All ranks."""
    device = next(engine.module.parameters()).device
    steps = total_steps(recipe, len(data.train))
    describe(recipe, data, run, engine.module.model, steps, choices)
    _check_positions(data, engine.module.model.config)
    _check_start(recipe, data, objective, device)
    done = checkpoint.resume(engine, run.checkpoints)
    if done:
        run.say(f"continuing after step {done}")
    if recipe.eval_only:
        if not len(data.validation):
            raise ValueError(f"eval_only: {recipe.data_dir} has no validation rows; prepare it with --val_size")
        run.say("  ".join(f"{name} {value:.4f}" for name, value in evaluate(recipe, engine, data.validation, objective, device).items()))
        return

    run.start(done + 1, steps)

    def validate(step: int) -> None:
        metrics = evaluate(recipe, engine, data.validation, objective, device)
        run.log(step, "eval", metrics)
        run.say(f"eval at step {step} | " + " | ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    validating = bool(recipe.eval_interval and len(data.validation))
    if validating and not done:
        validate(0)
    tokens = _tokens_before(recipe, data.train, done)
    for step in range(done + 1, steps + 1):
        started = time.perf_counter()
        lr = learning_rate(recipe, step, steps)
        engines.set_learning_rate(engine, lr)
        metrics, step_tokens = train_step(recipe, engine, data.train, objective, step, device)
        tokens += step_tokens
        seconds = time.perf_counter() - started
        metrics |= {
            "learning_rate": lr,
            "grad_norm": engines.grad_norm(engine),
            "epoch": step / batches.steps_per_epoch(len(data.train), recipe.global_batch_size),
            "num_tokens": tokens,
            "step_ms": 1000 * seconds,
            "tokens_per_second": step_tokens / seconds,
        }
        run.log(step, "train", metrics)
        run.step_line(step, metrics)
        if not math.isfinite(metrics["loss"]):
            raise ValueError(f"the loss of step {step} is {metrics['loss']}; the run stops before it spoils the weights further")
        if validating and (step % recipe.eval_interval == 0 or step == steps):
            validate(step)
        if recipe.save_interval and step % recipe.save_interval == 0 and step < steps:
            run.say(f"saved {checkpoint.save(engine, run.checkpoints, step)}")
    if steps > done:
        run.say(f"saved {checkpoint.save(engine, run.checkpoints, steps)}")
    finish(engine, chat, run)


def train_step(recipe: Recipe, engine, split: Split, objective: SFT | DPO, step: int, device) -> tuple[dict[str, float], int]:
    """One optimizer step: its metrics and its tokens over all ranks. All ranks."""
    indices = batches.step_examples(len(split), recipe.global_batch_size, recipe.seed, step)
    totals = objective.totals(split, indices)
    mine = _my_share(recipe, split, indices)
    sums = torch.zeros(len(objective.sums), dtype=torch.float64, device=device)
    if recipe.dropout:  # its masks follow the seed, differ between ranks, and are drawn again alike after a resume
        torch.manual_seed((recipe.seed << 32) + step * dist.get_world_size() + dist.get_rank())
    if step == 1:
        # The run's largest micro-batch goes first, with weight 0: memory fails now or never, and the gradients are the same bits
        largest = batches.largest_micro_batch(split.lengths, recipe.global_batch_size, recipe.max_tokens_per_gpu, dist.get_world_size())
        loss, _ = objective.loss(split.micro_batch(largest).to(device), totals)
        engines.train_micro_batch(engine, loss * 0.0, is_last=False)
    for i, part in enumerate(mine):
        loss, part_sums = objective.loss(split.micro_batch(part).to(device), totals)
        engines.train_micro_batch(engine, loss, is_last=i == len(mine) - 1)
        sums += part_sums
    return _reduce(objective, sums, totals), int(split.lengths[indices].sum())


@torch.no_grad()
def evaluate(recipe: Recipe, engine, split: Split, objective: SFT | DPO, device) -> dict[str, float]:
    """Metrics over the validation set, every example once, weighted as in training, on all ranks. All ranks."""
    count = min(len(split), recipe.eval_iters * recipe.global_batch_size or len(split))
    indices = np.arange(count)
    sums = torch.zeros(len(objective.sums), dtype=torch.float64, device=device)
    totals = objective.totals(split, indices)
    engine.eval()
    for part in _my_share(recipe, split, indices):
        sums += objective.loss(split.micro_batch(part).to(device), totals)[1]
    engine.train()
    return _reduce(objective, sums, totals)


def finish(engine, chat: ChatFormat, run: Run) -> None:
    """Write final/. All ranks."""
    state = engines.gathered_state_dict(engine)
    if state is not None:
        policies.write_model(engine.module, state, chat, run.final)
    dist.barrier()
    run.say(f"saved {run.final}")
    run.close()


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


def _check_start(recipe: Recipe, data: PreparedData, objective: SFT | DPO, device) -> None:
    if recipe.checks == "off":
        return
    first = batches.step_examples(len(data.train), recipe.global_batch_size, recipe.seed, 1)
    lengths = np.concatenate([data.train.lengths, data.train.trained])
    plan = hashlib.sha256(f"{batches.PLAN_VERSION} {recipe.model_dump()}".encode() + lengths.tobytes() + first.tobytes())
    checks.same_on_all_ranks("recipe or prepared data", plan.hexdigest())
    if isinstance(objective, DPO) and objective.reference is not None:
        part = _my_share(recipe, data.train, first)[0]
        dtype = getattr(torch, recipe.dtype)
        checks.policy_equals_reference(objective, data.train.micro_batch(part).to(device), dtype)


def _my_share(recipe: Recipe, split: Split, indices: np.ndarray) -> list[np.ndarray]:
    """This rank's micro-batches of the given examples, as indices into the split."""
    ranks = batches.micro_batches(split.lengths[indices], recipe.max_tokens_per_gpu, dist.get_world_size())
    return [indices[part] for part in ranks[dist.get_rank()]]


def _reduce(objective: SFT | DPO, sums: torch.Tensor, totals: dict[str, int]) -> dict[str, float]:
    """Sums of all ranks -> metrics. Forces a device sync. All ranks."""
    dist.all_reduce(sums)
    return objective.metrics(dict(zip(objective.sums, sums.tolist(), strict=True)), totals)


def _tokens_before(recipe: Recipe, split: Split, done: int) -> int:
    """Tokens seen in steps 1 to `done`."""
    per_epoch = batches.steps_per_epoch(len(split), recipe.global_batch_size)
    whole, rest = divmod(done, per_epoch)
    tail = range(whole * per_epoch + 1, whole * per_epoch + rest + 1)
    partial = sum(int(split.lengths[batches.step_examples(len(split), recipe.global_batch_size, recipe.seed, s)].sum()) for s in tail)
    return whole * int(split.lengths.sum()) + partial
