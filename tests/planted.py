"""Worker of test_planted.py, started by the deepspeed launcher: a real run with one fault planted in it.

    planted.py FAULT sft|dpo --key=value ...

Each fault changes one thing that the code under test takes for granted, before the script's own main function runs. $PLANT says where.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from posttrain import data, dpo, loop, policy, sft  # noqa: E402
from posttrain.objectives import SFT  # noqa: E402
from posttrain.run import main  # noqa: E402

RANK, PLANT = int(os.environ["RANK"]), os.environ.get("PLANT", "")
load_policy, load_model, load_data, sft_loss, train_step = dpo.load_policy, policy.load_model, data.load, SFT.loss, loop.train_step
forward = policy.Policy.forward


def reference_of_another_checkpoint():
    def load(recipe, *arguments, frozen=False, **others):
        return load_policy(
            recipe.model_copy(update={"sft_checkpoint_path": PLANT}) if frozen else recipe, *arguments, frozen=frozen, **others
        )

    dpo.load_policy = load


def one_rank_with_a_changed_weight():
    def load(*arguments):
        model = load_model(*arguments)
        if RANK == 1:
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[5, 7] += 1e-6
        return model

    policy.load_model = load


def one_rank_with_other_data():
    data.load = lambda directory, *arguments: load_data(PLANT if RANK == 1 else directory, *arguments)


def dropout_left_on():
    def load(*arguments, frozen=False, **others):
        made, choices = load_policy(*arguments, frozen=frozen, **others)
        if not frozen:
            made.model.model.layers[0].self_attn.attention_dropout = 0.1
        return made, choices

    dpo.load_policy = sft.load_policy = load


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


def spikes():
    """$PLANT: the steps whose gradient is scaled up, and how much: STEP:SCALE,..."""
    scales = {int(step): float(scale) for step, scale in (one.split(":") for one in PLANT.split(","))}

    def step(recipe, engine, split, objective, number, *arguments, **others):
        objective.scale = scales.get(number, 1.0)
        return train_step(recipe, engine, split, objective, number, *arguments, **others)

    def loss(objective, batch, totals):
        share, sums = sft_loss(objective, batch, totals)
        return share * getattr(objective, "scale", 1.0), sums

    loop.train_step, SFT.loss = step, loss


if __name__ == "__main__":
    fault, name, *arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    if fault != "none":
        globals()[fault]()
    sys.argv[1:] = arguments
    main({"sft": sft.sft, "dpo": dpo.dpo}[name])
