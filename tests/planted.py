"""Worker of test_planted.py, started by the deepspeed launcher: real runs with a fault planted in each.

    planted.py FAULT sft|dpo --key=value ...      one run, to its own end; $PLANT says where the fault is
    planted.py JOBS.json                          several that stop before their first step, one after another: [[FAULT, PLANT, sft|dpo,
                                                  [--key=value, ...]], ...] -> JOBS.json.out, the message of each

Each fault changes one thing that the code under test takes for granted, before the script's own main function runs.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from posttrain.engine import shards  # noqa: E402
from posttrain.model import policy  # noqa: E402
from posttrain.objectives.likelihood import SFT  # noqa: E402
from posttrain.objectives.preference import DPO  # noqa: E402
from posttrain.parallel.script import run_script  # noqa: E402
from posttrain.training import build, command, loop, replay  # noqa: E402

RANK, PLANT = int(os.environ["RANK"]), os.environ.get("PLANT", "")
SCRIPTS = {"sft": command.sft, "dpo": command.dpo}
PLACES = [(command, "load_recipe_of"), (build, "load_policy"), (policy, "load_model"), (loop, "train_step")]
PLACES += [(build, "load_prepared"), (policy.Policy, "forward"), (SFT, "loss"), (DPO, "preference_losses")]
load_policy, load_model, load_data, sft_loss, train_step = (
    build.load_policy,
    policy.load_model,
    build.load_prepared,
    SFT.loss,
    loop.train_step,
)
forward = policy.Policy.forward


def reference_of_another_checkpoint():
    def load(recipe, *arguments, frozen=False, **others):
        return load_policy(
            recipe.model_copy(update={"sft_checkpoint_path": PLANT}) if frozen else recipe, *arguments, frozen=frozen, **others
        )

    build.load_policy = load


def one_rank_with_another_token():
    def load(*arguments):
        prepared = load_data(*arguments)
        plain = prepared.train.micro_batch

        def micro_batch(indices):
            batch = plain(indices)
            return batch._replace(input_ids=batch.input_ids.index_fill(1, torch.tensor([2]), 9)) if RANK == 1 else batch

        prepared.train.micro_batch = micro_batch
        return prepared

    build.load_prepared = load


def one_rank_with_another_recipe():
    load = command.load_recipe_of
    command.load_recipe_of = lambda *arguments: load(*arguments).model_copy(update={"learning_rate": 0.5} if RANK == 1 else {})


def a_loss_that_is_off():
    plain = DPO.preference_losses
    DPO.preference_losses = lambda *arguments: plain(*arguments) + 0.05


def a_reference_that_computes_otherwise():
    """The same weights, another forward pass."""

    def log_probs(self, batch):
        return forward(self, batch) * (1.0 if self.training else 1.0001)

    policy.Policy.forward = log_probs


def weights_that_are_nan():
    def load(*arguments):
        model = load_model(*arguments)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[1, 1] = torch.nan
        return model

    policy.load_model = load


def one_rank_with_other_data():
    def load(directory, *arguments):
        return load_data(PLANT if RANK == 1 else directory, *arguments)

    build.load_prepared = load


def dropout_left_on():
    def load(*arguments, frozen=False, **others):
        made, choices = load_policy(*arguments, frozen=frozen, **others)
        if not frozen:
            made.model.model.layers[0].self_attn.attention_dropout = 0.1
        return made, choices

    build.load_policy = load


def one_example_is_nan():
    """$PLANT: the token ids of the example."""
    marked = [int(token) for token in PLANT.split(",")]

    def log_probs(self, batch):
        logps, row = forward(self, batch), batch.input_ids[0].tolist()
        starts = [start for start in range(len(row)) if row[start : start + len(marked)] == marked]
        for start in starts:
            logps = torch.where((batch.rows >= start) & (batch.rows < start + len(marked)), torch.nan, logps)
        return logps

    policy.Policy.forward = log_probs
    loop.train_step = replay.train_step = refused_steps_leave_no_trace


def optimizer_state(training) -> dict[str, str]:
    """Hashes of everything that an optimizer step changes: weights, float32 master weights, moments and their clock."""
    optimizer = training.engine.optimizer
    tensors = {f"weight {i}": getattr(p, "ds_tensor", p) for i, p in enumerate(training.engine.module.parameters())}
    for i, (parameter, state) in enumerate(getattr(optimizer, "optimizer", optimizer).state.items()):
        tensors[f"master {i}"] = parameter
        tensors |= {f"{name} {i}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"{name} {i}": torch.tensor(value) for name, value in state.items() if isinstance(value, int)}
    return {name: hashlib.sha256(t.detach().float().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def refused_steps_leave_no_trace(training, number, *arguments, **others):
    before = optimizer_state(training)
    result = train_step(training, number, *arguments, **others)
    after = optimizer_state(training)
    if result.refused:
        assert after == before, [name for name in after if after[name] != before.get(name)]
    else:
        assert after != before
    return result


def spikes():
    """$PLANT: the steps whose gradient is scaled up, and how much: STEP:SCALE,..."""
    scales = {int(step): float(scale) for step, scale in (one.split(":") for one in PLANT.split(","))}

    def step(training, number, *arguments, **others):
        training.objective.scale = scales.get(number, 1.0)
        return refused_steps_leave_no_trace(training, number, *arguments, **others)

    def loss(objective, batch, totals, *examples):
        share, sums = sft_loss(objective, batch, totals, *examples)
        return share * getattr(objective, "scale", 1.0), sums

    loop.train_step = replay.train_step = step
    SFT.loss = loss


def a_weight_becomes_nan():
    """On rank 1, after step 2, which is applied as all others are."""

    def step(training, number, *arguments, **others):
        result = train_step(training, number, *arguments, **others)
        if number == 2 and RANK == 1:
            with torch.no_grad():
                shards.master_weights(training.engine)[0][-1].view(-1)[-1] = torch.nan
        return result

    loop.train_step = step


def one_rank_hangs():
    """$PLANT: how many micro-batches rank 1 computes before it stays in one for ever; it can still answer."""
    left = int(PLANT)

    def loss(objective, batch, totals, *examples):
        nonlocal left
        left -= 1
        while RANK == 1 and left < 0:
            time.sleep(0.1)
        return sft_loss(objective, batch, totals, *examples)

    SFT.loss = loss


def stop_one_after_another(jobs: Path) -> None:
    messages = []
    for fault, where, script, arguments in json.loads(jobs.read_text()):
        globals()["PLANT"] = where
        before = [getattr(*place) for place in PLACES]
        globals()[fault]()
        sys.argv[1:] = arguments
        try:
            SCRIPTS[script]()
            messages.append("it was not stopped")
        except (ValueError, OSError) as error:  # what script.run_script makes a message of
            messages.append(str(error))
        for place, value in zip(PLACES, before, strict=True):
            setattr(*place, value)
    if RANK == 0:
        Path(f"{jobs}.out").write_text(json.dumps(messages))


def none():
    """No fault in the code: it is in what the arguments name."""


if __name__ == "__main__":
    first, *others = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    if not others:
        stop_one_after_another(Path(first))
    else:
        globals()[first]()
        sys.argv[1:] = others[1:]
        run_script(SCRIPTS[others[0]])
