"""Direct Preference Optimization of an SFT checkpoint, against itself frozen as the reference.

deepspeed --num_gpus 8 posttrain/dpo.py [RECIPE.yaml] [--key=value ...]
python posttrain/dpo.py ...                  the same on one device; --help lists every key
"""

import sys

from posttrain import data, reference
from posttrain.checks import same_inputs_on_all_ranks
from posttrain.config import DPORecipe, load_recipe
from posttrain.engine import (
    build_engine,
    build_reference,
    check_versions,
    checkpoint_function,
    launch_shape,
    read_ds_config,
    start_distributed,
)
from posttrain.entry import main
from posttrain.fit import planned
from posttrain.loop import train
from posttrain.objectives import DPO, needs_reference
from posttrain.policy import load_chat, load_policy, prepare_command
from posttrain.run import Run, already_finished, resolve
from posttrain.step import Training
from posttrain.terminal import keep_noise


def dpo() -> None:
    check_versions()
    recipe = load_recipe(DPORecipe, "dpo_qwen3_1.8b", sys.argv[1:])
    rank, world_size = launch_shape()
    recipe = resolve(recipe, "dpo", world_size)
    if already_finished(recipe, rank):
        return

    keep_noise()
    ds_config = read_ds_config(recipe.ds_config)
    prepared = data.load(recipe.dpo_data_dir, "dpo", prepare_command(recipe), recipe.share_prompt)
    chat = load_chat(recipe, prepared.manifest)
    device = start_distributed(recipe.watchdog_seconds)
    same_inputs_on_all_ranks(recipe, prepared)
    settled = planned(recipe, prepared, device)

    def frozen():
        return build_reference(load_policy(recipe, chat.tokenizer, device, frozen=True)[0], recipe)

    precompute = recipe.reference == "precompute" and not recipe.only_looks  # looking writes nothing, beside the data neither
    beside = frozen() if needs_reference(recipe) and not precompute else None
    policy, choices = load_policy(recipe, chat.tokenizer, device, checkpoint_function(recipe, ds_config))
    if needs_reference(recipe) and precompute:
        choices.append(reference.attach(settled, prepared, policy.fingerprint, device, frozen))
    engine = build_engine(policy, recipe, ds_config)
    run = Run(recipe, "dpo", rank, {"data": prepared.fingerprint, "model": policy.fingerprint})
    train(Training(settled, engine, prepared, DPO(engine, beside, recipe)), chat, run, choices)


if __name__ == "__main__":
    main(dpo)
