"""Direct Preference Optimization of an SFT checkpoint, against itself frozen as the reference.

deepspeed --num_gpus 8 posttrain/dpo.py [RECIPE.yaml] [--key=value ...]
python posttrain/dpo.py ...                  the same on one device; --help lists every key
"""

import sys

from posttrain.common.terminal import keep_noise
from posttrain.data.prepared import load_prepared
from posttrain.engine.build import build_engine, build_reference
from posttrain.engine.ds_config import checkpoint_function, read_ds_config
from posttrain.engine.start import check_versions, launch_shape, start_distributed
from posttrain.model.policy import load_policy
from posttrain.objectives.preference import DPO
from posttrain.parallel.script import run_script
from posttrain.recipes.keys import DPORecipe
from posttrain.recipes.reading import load_recipe
from posttrain.run.directory import Run
from posttrain.run.resume import already_finished, resolve
from posttrain.training import reference
from posttrain.training.auto_batch import with_tokens_planned
from posttrain.training.inputs import load_chat, prepare_command, same_inputs_on_all_ranks
from posttrain.training.loop import train
from posttrain.training.step import Training


def dpo() -> None:
    check_versions()
    recipe = load_recipe(DPORecipe, "dpo_qwen3_1.8b", sys.argv[1:])
    rank, world_size = launch_shape()
    recipe = resolve(recipe, "dpo", world_size)
    if already_finished(recipe, rank):
        return

    keep_noise()
    ds_config = read_ds_config(recipe.ds_config)
    prepared = load_prepared(recipe.dpo_data_dir, "dpo", prepare_command(recipe), recipe.share_prompt)
    chat = load_chat(recipe, prepared.manifest)
    device = start_distributed(recipe.watchdog_seconds)
    same_inputs_on_all_ranks(recipe, prepared)
    settled = with_tokens_planned(recipe, prepared, device)

    def frozen():
        return build_reference(load_policy(recipe, chat.tokenizer, device, frozen=True)[0], recipe)

    precompute = recipe.reference == "precompute" and not recipe.only_looks  # looking writes nothing, beside the data neither
    beside = frozen() if recipe.needs_reference and not precompute else None
    policy, choices = load_policy(recipe, chat.tokenizer, device, checkpoint_function(recipe, ds_config))
    if recipe.needs_reference and precompute:
        choices.append(reference.attach(settled, prepared, policy.fingerprint, device, frozen))
    engine = build_engine(policy, recipe, ds_config)
    run = Run(recipe, "dpo", rank, {"data": prepared.fingerprint, "model": policy.fingerprint})
    train(Training(settled, engine, prepared, DPO(engine, beside, **recipe.objective)), chat, run, choices)


if __name__ == "__main__":
    run_script(dpo)
