"""Builds DeepSpeed engines around the policy and the reference."""

import contextlib
import io

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from torch import distributed as dist

from posttrain.common.terminal import say
from posttrain.engine.ds_config import REFERENCE, accumulates_in_fp32, merge_config, read_ds_config
from posttrain.engine.optimizer import add_gradients_directly, make_optimizer, parameter_groups, undo_first_step
from posttrain.engine.shards import clear_padding
from posttrain.engine.update import TrainingEngine, UpdateGate
from posttrain.operators import layers
from posttrain.parallel import distribute
from posttrain.recipes.keys import Recipe


def build_engine(policy: torch.nn.Module, recipe: Recipe, json_config: dict) -> TrainingEngine:
    """Build the engine that trains `policy`; `json_config` is the recipe's checked ds_config. All ranks."""
    config = merge_config(recipe, json_config)
    if not accumulates_in_fp32(recipe, json_config) and dist.get_rank() == 0:
        say("warning    at ZeRO-0 in bfloat16 DeepSpeed adds up gradients in bfloat16; ds_configs/zero1.json does it in float32")
    policy.train()
    if is_sharded(json_config):
        shard(policy, config)
    optimizer = make_optimizer(parameter_groups(policy, recipe.weight_decay), recipe, json_config)
    gate = UpdateGate(optimizer)
    wrapped = _initialize(recipe, policy, optimizer=optimizer, config=config)
    undo_first_step(wrapped.optimizer)
    add_gradients_directly(wrapped.optimizer)
    engine = TrainingEngine(wrapped, gate)
    clear_padding(engine)
    return engine


def build_reference(policy: torch.nn.Module, recipe: Recipe):
    """Build an engine for the frozen reference: plain DeepSpeed at ZeRO-3, without an optimizer. All ranks."""
    config = merge_config(recipe.model_copy(update={"activation_checkpointing": "none"}), read_ds_config(REFERENCE))
    config |= {"gradient_clipping": 0.0, "data_types": {}}
    policy.eval().requires_grad_(False)
    if is_sharded(config):
        shard(policy, config)
    engine = _initialize(recipe, policy, config=config)
    engine.eval()
    return engine


def is_sharded(config: dict) -> bool:
    """Whether with this ds_config every rank has only a part of each weight."""
    return config.get("zero_optimization", {}).get("stage") == 3 and dist.get_world_size() > 1


def shard(model: torch.nn.Module, config: dict) -> None:
    """Give every rank its part of each weight for ZeRO-3; rank 0 sends one after another. All ranks.

    deepspeed.initialize (0.19.8) would do so, too, but first put the whole model on each GPU.
    """
    node = groups._get_zero_param_intra_parallel_group()  # of hpZ, if an engine before has made it
    with contextlib.redirect_stdout(io.StringIO()):
        init = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=config, zero_param_parallel_group=node)
    device = torch.device(get_accelerator().current_device_name())
    distribute.each_weight(model, device, lambda parameter: init._convert_to_zero_parameters([parameter]))


def _initialize(recipe: Recipe, model, **settings):
    """Wrap a model in DeepSpeed's engine; `settings` go to deepspeed.initialize. All ranks."""
    if recipe.compile:  # ZeRO-3 then gathers each layer as a whole; its hooks inside a layer would break the compiled graph
        deepspeed.utils.set_z3_leaf_modules(model, [type(layers.decoder_layers(model.model)[0])])
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed 0.19.8 prints the memory in use 4 times and more for bfloat16 at ZeRO-1
        return deepspeed.initialize(model=model, **settings)[0]


def forget_activations() -> None:
    """Clear DeepSpeed's activation checkpointing after a forward pass in training mode without the backward pass that it expects."""
    if deepspeed.checkpointing.is_configured():
        deepspeed.checkpointing.reset()
