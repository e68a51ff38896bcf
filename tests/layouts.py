"""Worker of test_layouts.py, started by the deepspeed launcher: the same few steps in many layouts, one after another.

    layouts.py OUT.json TINY_FOLDER [--local_rank=N]

Writes {case: {layout: [[loss, gradient norm, ...] per step]}} on rank 0.
"""

import json
import sys
from pathlib import Path

from torch import distributed as dist

from posttrain import data
from posttrain import engine as engines
from posttrain.config import DPORecipe, SFTRecipe, build_recipe
from posttrain.loop import train_step
from posttrain.objectives import DPO, SFT
from posttrain.policy import load_chat, load_policy

STEPS = 4
SMALL, LARGE = 160, 4096  # tokens in a micro-batch: several a step, or one
LAYOUTS = {
    "zero0": {"ds_config": "ds_configs/zero0.json", "max_tokens_per_gpu": LARGE},
    "zero0 small": {"ds_config": "ds_configs/zero0.json", "max_tokens_per_gpu": SMALL},
    "zero1": {"ds_config": "ds_configs/zero1.json", "max_tokens_per_gpu": LARGE},
    "zero1 small selective": {
        "ds_config": "ds_configs/zero1.json",
        "max_tokens_per_gpu": SMALL,
        "activation_checkpointing": "selective",
    },
    "zero2": {"ds_config": "ds_configs/zero2.json", "max_tokens_per_gpu": LARGE},
    "zero2 small": {"ds_config": "ds_configs/zero2.json", "max_tokens_per_gpu": SMALL},
    "zero3": {"ds_config": "ds_configs/zero3.json", "max_tokens_per_gpu": LARGE},
    "zero3 small full": {"ds_config": "ds_configs/zero3.json", "max_tokens_per_gpu": SMALL, "activation_checkpointing": "full"},
    "zero3 selective": {"ds_config": "ds_configs/zero3.json", "max_tokens_per_gpu": LARGE, "activation_checkpointing": "selective"},
    "zero3 offload": {"ds_config": "ds_configs/zero3_offload.json", "max_tokens_per_gpu": SMALL},
}
COMMON = {
    "out_dir": "unused",
    "max_iters": STEPS,
    "global_batch_size": 9,  # a multiple of nothing
    "learning_rate": 1e-2,
    "min_lr": 1e-2,
    "grad_clip": 0.5,
    "seed": 3,
}


def run(kind: str, tiny: str, layout: dict, dtype: str) -> list[list[float]]:
    if kind == "sft":
        recipe = build_recipe(SFTRecipe, {**COMMON, "checkpoint_path": f"{tiny}/base", "sft_data_dir": f"{tiny}/sft"}, {})
    else:
        paths = {"sft_checkpoint_path": f"{tiny}/base", "dpo_data_dir": f"{tiny}/dpo", "chosen_nll_weight": 0.3}
        recipe = build_recipe(DPORecipe, {**COMMON, **paths}, {})
    recipe = recipe.model_copy(update={**layout, "dtype": dtype})
    ds_config = engines.read_ds_config(recipe.ds_config)
    prepared = data.load(recipe.data_dir, kind, "", getattr(recipe, "share_prompt", True))
    chat = load_chat(recipe, prepared.manifest)
    device = engines.start_distributed()
    objective = None
    if kind == "dpo":
        reference = engines.build_reference(load_policy(recipe, chat.tokenizer, device, frozen=True)[0], recipe)
    policy, _ = load_policy(recipe, chat.tokenizer, device, engines.checkpoint_function(recipe, ds_config))
    engine = engines.build_engine(policy, recipe, ds_config)
    objective = SFT(engine) if kind == "sft" else DPO(engine, reference, recipe)
    history = []
    for step in range(1, STEPS + 1):
        engines.set_learning_rate(engine, recipe.learning_rate)
        metrics, _ = train_step(recipe, engine, prepared.train, objective, step, device)
        history.append([metrics["loss"], engines.grad_norm(engine), metrics.get("rewards/margins", 0.0)])
    return history


def main() -> None:
    out, tiny = sys.argv[-2:]
    results = {}
    for kind in ("sft", "dpo"):
        for dtype in ("float32", "bfloat16"):
            few = {name: LAYOUTS[name] for name in ("zero0", "zero1", "zero2 small", "zero3")}
            layouts = LAYOUTS if dtype == "float32" and engines.launch_shape()[1] < 3 else few
            for name, layout in layouts.items():
                results.setdefault(f"{kind} {dtype}", {})[name] = run(kind, tiny, layout, dtype)
            if kind == "dpo":
                unshared = {**LAYOUTS["zero2 small"], "share_prompt": False}
                results[f"{kind} {dtype}"]["zero2 small, prompt not shared"] = run(kind, tiny, unshared, dtype)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
