"""Supervised fine-tuning of a base model on conversations.

deepspeed --num_gpus 8 posttrain/sft.py [RECIPE.yaml] [--key=value ...]
python posttrain/sft.py ...                  the same on one device; --help lists every key
"""

import sys

from posttrain import data
from posttrain.checks import same_inputs_on_all_ranks
from posttrain.config import SFTRecipe, load_recipe
from posttrain.engine import build_engine, check_versions, checkpoint_function, launch_shape, read_ds_config, start_distributed
from posttrain.entry import main
from posttrain.fit import planned
from posttrain.loop import train
from posttrain.objectives import SFT
from posttrain.policy import load_chat, load_policy, prepare_command
from posttrain.run import Run, already_finished, resolve
from posttrain.step import Training
from posttrain.terminal import keep_noise


def sft() -> None:
    check_versions()
    recipe = load_recipe(SFTRecipe, "sft_qwen3_1.8b", sys.argv[1:])
    rank, world_size = launch_shape()
    recipe = resolve(recipe, "sft", world_size)
    if already_finished(recipe, rank):
        return

    keep_noise()
    ds_config = read_ds_config(recipe.ds_config)
    prepared = data.load(recipe.sft_data_dir, "sft", prepare_command(recipe))
    chat = load_chat(recipe, prepared.manifest)
    device = start_distributed(recipe.watchdog_seconds)
    same_inputs_on_all_ranks(recipe, prepared)
    settled = planned(recipe, prepared, device)
    policy, choices = load_policy(recipe, chat.tokenizer, device, checkpoint_function(recipe, ds_config))
    engine = build_engine(policy, recipe, ds_config)
    run = Run(recipe, "sft", rank, {"data": prepared.fingerprint, "model": policy.fingerprint})
    train(Training(settled, engine, prepared, SFT(engine)), chat, run, choices)


if __name__ == "__main__":
    main(sft)
