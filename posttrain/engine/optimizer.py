"""The optimizer that DeepSpeed wraps: AdamW and its parameter groups."""

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from posttrain.engine.cpu_adam import load_cpu_adam
from posttrain.engine.ds_config import offloads_optimizer
from posttrain.recipes.keys import Recipe


def make_optimizer(groups: list[dict], recipe: Recipe, json_config: dict) -> torch.optim.Optimizer:
    """Returns AdamW over the groups: torch's fused one, or DeepSpeed's for the CPU if the ds_config offloads its states."""
    settings = {"lr": recipe.learning_rate, "betas": (recipe.beta1, recipe.beta2), "eps": 1e-8}
    if offloads_optimizer(json_config):
        load_cpu_adam()
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **settings, adamw_mode=True)
    return torch.optim.AdamW(groups, **settings, fused=True)


def parameter_groups(policy: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Returns the policy's trained parameters in two groups: weight decay for matrices only, as is usual for transformers."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    dimensions = [len(getattr(p, "ds_shape", p.shape)) for p in parameters]  # ds_shape: of a parameter that ZeRO-3 has sharded
    matrices, others = ([p for p, n in zip(parameters, dimensions, strict=True) if (n >= 2) == is_matrix] for is_matrix in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def undo_first_step(optimizer) -> None:
    """Undo the step that DeepSpeed 0.19.8 makes with zero gradients to create the states of its bfloat16 optimizer for ZeRO-0.

    Otherwise Adam's step count would be 1 before step 1, and weight decay would be applied once more than in any other layout.
    """
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.optimizer.state.clear()
        for weights, master_weights in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master_weight in zip(weights, master_weights, strict=True):
                master_weight.data.copy_(weight.data)


def add_gradients_directly(optimizer) -> None:
    """Let DeepSpeed's bfloat16 optimizer for ZeRO-1 add each gradient to its float32 sum in one kernel, with the same bits.

    DeepSpeed 0.19.8 first makes a float32 copy: 18 bytes of traffic an element in the place of 10, and 4 bytes of memory.
    """
    if not isinstance(optimizer, BF16_Optimizer):
        return

    @torch.no_grad()
    def add(weight: torch.nn.Parameter, group: int, number: int, clear_lp_grads: bool) -> None:
        assert not clear_lp_grads  # with immediate_grad_update the gradient is freed in the next line of DeepSpeed's
        if weight.grad is None:
            return
        summed = optimizer.fp32_groups_gradients[group][number]
        summed.add_(weight.grad.view(summed.shape))
        weight._hp_grad, optimizer.fp32_groups_has_gradients[group][number] = summed, True

    optimizer._update_hp_grad = add


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Returns which optimizer runs, and why, for the lines that a run prints first."""
    if isinstance(optimizer, deepspeed.ops.adam.DeepSpeedCPUAdam):
        return "DeepSpeed's CPU Adam (its states are offloaded)"
    return "torch's fused AdamW (measured to be as fast as memory allows; DeepSpeed's would have to be compiled first)"
