"""The training engine: DeepSpeed's engine around the policy, with backward passes, guarded updates and saves.

How a step's loss is scaled: DeepSpeed averages gradients over W ranks, but wanted is the gradient of sum(losses) / total over all ranks
and micro-batches. So each micro-batch contributes loss_sum * W / total with scale_wrt_gas=False, and only the last one of a step
is a gradient-accumulation boundary. This allows any number of micro-batches in a step, at every ZeRO stage.
"""

import gc
import math
from pathlib import Path

import torch
from torch import distributed as dist

from posttrain.engine.optimizer import describe_optimizer


class UpdateGate:
    """Replaces the optimizer's `step` by one that does nothing if the gradient norm is too large or not finite.

    The check has to be there, as DeepSpeed computes the norm inside its own step(). The optimizer keeps its class, since DeepSpeed (0.19.8)
    compares exact types to choose how to wrap it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.engine: TrainingEngine | None = None  # None until it is built; steps that DeepSpeed makes before that pass
        self.largest_norm = math.inf
        self.unguarded_step, optimizer.step = optimizer.step, self.step

    def step(self, *args, **kwargs):
        """Step the optimizer if the gate is open."""
        return self.unguarded_step(*args, **kwargs) if self.is_open() else None

    def is_open(self) -> bool:
        """Whether this step's gradient norm is finite and not above `largest_norm`."""
        if self.engine is None:
            return True
        norm = self.engine.grad_norm
        return math.isfinite(norm) and norm <= self.largest_norm


class TrainingEngine:
    """DeepSpeed's engine around the policy. All ranks call its methods, the same number of times."""

    def __init__(self, wrapped, gate: UpdateGate):
        """`wrapped` is DeepSpeed's engine, whose optimizer steps through `gate`."""
        self.wrapped, self.gate = wrapped, gate
        self.own_norm: torch.Tensor | None = None
        gate.engine = self

    def __call__(self, batch) -> torch.Tensor:
        """Run the policy's forward pass on a micro-batch."""
        return self.wrapped(batch)

    @property
    def module(self):
        """The policy, without DeepSpeed's engine around it."""
        return self.wrapped.module

    @property
    def device(self) -> torch.device:
        return self.wrapped.device

    @property
    def zero_stage(self) -> int:
        return self.wrapped.zero_optimization_stage()

    @property
    def optimizer(self):
        """DeepSpeed's optimizer, which shards the states; at ZeRO-0 in float32 it is torch's own."""
        return self.wrapped.optimizer

    @property
    def optimizer_said(self) -> str:
        """Which optimizer runs, and why, for the lines that a run prints first."""
        return describe_optimizer(self.wrapped.basic_optimizer)

    def train(self) -> None:
        self.wrapped.train()

    def eval(self) -> None:
        self.wrapped.eval()

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Run backward on one micro-batch's share of the step's loss, already divided by the step's total; `update` follows the last."""
        self.wrapped.set_gradient_accumulation_boundary(is_last)
        self.wrapped.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
        if not is_last:
            self.wrapped.step()  # only counts the micro-batch

    def update(self, largest_norm: float = math.inf) -> tuple[float, bool]:
        """Step the optimizer, unless the gradient norm is above `largest_norm` or not finite: then weights and states stay unchanged.

        Returns the global gradient norm before clipping (DeepSpeed gives inf for nan, too), and whether the step was applied.
        """
        self.own_norm = self._norm_that_deepspeed_leaves_out()
        self.gate.largest_norm = largest_norm
        self.wrapped.step()
        applied = self.wrapped.was_step_applied() and self.gate.is_open()
        if not applied and getattr(self.optimizer, "cpu_offload", False):
            # DeepSpeed 0.19.8 clears a skipped step's gradients at ZeRO-1 and 2, except with an offloaded optimizer: a nan would stay
            for group in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[group] = None
        return self.grad_norm, applied

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the current or last step, before clipping."""
        return float(self.optimizer._global_grad_norm if self.own_norm is None else self.own_norm)

    def _norm_that_deepspeed_leaves_out(self) -> torch.Tensor | None:
        """Returns the gradient norm in float32 at ZeRO-0, where each rank has all averaged gradients; else None: DeepSpeed has it."""
        if self.zero_stage > 0 or self.wrapped.bfloat16_enabled():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def save(self, folder: Path, tag: str, writer) -> str:
        """Let `writer`, a DeepSpeed checkpoint engine, save the training state in FOLDER/TAG. Returns the name of this rank's file."""
        self.wrapped.checkpoint_engine = writer
        self.wrapped.save_checkpoint(str(folder), tag=tag, save_latest=False)
        name_of = self.wrapped._get_zero_ckpt_name if self.zero_stage else self.wrapped._get_ckpt_name
        return Path(name_of("", "")).name

    def free(self) -> None:
        """Destroy the engine and its model, and free their memory while the process goes on."""
        free_engine(self.wrapped)
        vars(self.gate).clear()  # which still knows the optimizer


def free_engine(engine) -> None:
    """Destroy a DeepSpeed engine and its model, and free their memory while the process goes on.

    DeepSpeed 0.19.8 keeps references to modules that it has wrapped at ZeRO-3 for good, in caches and hooks: so their tensors are emptied.
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
