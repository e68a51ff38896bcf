"""DeepSpeed engines around the policy and the reference: built, and ended."""

import contextlib
import gc
import io

import deepspeed
import torch
from torch import distributed as dist

from posttrain.engine.ds_config import accumulates_in_fp32, merge_config, read_ds_config
from posttrain.engine.optimizer import make_optimizer, parameter_groups, undo_first_step
from posttrain.engine.update import put_gate_before
from posttrain.recipes.keys import Recipe


def build_engine(policy: torch.nn.Module, recipe: Recipe, json_config: dict):
    """The training engine. All ranks."""
    config = merge_config(recipe, json_config)
    if not accumulates_in_fp32(recipe, json_config) and dist.get_rank() == 0:
        print(
            "warning  at ZeRO-0 in bfloat16 DeepSpeed adds up gradients in bfloat16; ds_configs/zero1.json does it in float32", flush=True
        )
    policy.train()
    optimizer = make_optimizer(parameter_groups(policy, recipe.weight_decay), recipe, json_config)
    gate = put_gate_before(optimizer)
    engine = _initialize(recipe, policy, optimizer=optimizer, config=config)
    undo_first_step(engine.optimizer)
    engine.gate, gate.engine = gate, engine
    return engine


def _initialize(recipe: Recipe, model, **settings):
    if recipe.compile:  # ZeRO-3 then gathers a layer as a whole, and not within it, where its hooks would break the graph
        deepspeed.utils.set_z3_leaf_modules(model, [type(model.model.base_model.layers[0])])
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed 0.19.8 prints the memory in use 4 times and more for bfloat16 at ZeRO-1
        return deepspeed.initialize(model=model, **settings)[0]


def build_reference(policy: torch.nn.Module, recipe: Recipe):
    """The frozen reference in its own engine: ZeRO-3, no optimizer. All ranks."""
    config = merge_config(recipe.model_copy(update={"activation_checkpointing": "none"}), read_ds_config("ds_configs/zero3_inference.json"))
    policy.eval().requires_grad_(False)
    engine = _initialize(recipe, policy, config={**config, "gradient_clipping": 0.0, "data_types": {}})
    engine.eval()
    return engine


def free_engine(engine) -> None:
    """End an engine and its model, and give their memory back while others live on.

    DeepSpeed 0.19.8 keeps the modules that it has wrapped at ZeRO-3 for good, in caches and hooks: so what they hold is taken from them.
    """
    engine.destroy()
    for parameter in engine.module.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data = tensor.new_empty(0)
        parameter.grad = None
    if engine.optimizer:
        vars(engine.optimizer).clear()
    vars(engine).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_activations() -> None:
    """After a forward pass in training mode without a backward one: DeepSpeed's activation checkpointing counts on the two alternating."""
    if deepspeed.checkpointing.is_configured():
        deepspeed.checkpointing.reset()
