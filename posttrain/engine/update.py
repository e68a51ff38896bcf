"""DeepSpeed engines from a recipe and a JSON file: the one place where the two are merged, and the one that knows DeepSpeed's inside.

How a step's loss is scaled. DeepSpeed averages gradients over W ranks; wanted is the gradient of sum(losses) / total over all ranks
and micro-batches. So each micro-batch contributes loss_sum * W / total with scale_wrt_gas=False, and only the last one of a step
is a gradient-accumulation boundary: any number of micro-batches a step, in every ZeRO stage.
"""

import math

import torch
from torch import distributed as dist


class Gate:
    """Whether the optimizer may step. DeepSpeed knows the gradient norm only inside its own step(), so there it is asked."""

    engine = None  # until it is built; what DeepSpeed does to the optimizer before that may pass
    largest_norm = math.inf

    def is_open(self) -> bool:
        if self.engine is None:
            return True
        norm = grad_norm(self.engine)
        return math.isfinite(norm) and norm <= self.largest_norm


def put_gate_before(optimizer: torch.optim.Optimizer) -> Gate:
    gate, step = Gate(), optimizer.step
    optimizer.step = lambda *args, **kwargs: step(*args, **kwargs) if gate.is_open() else None
    return gate


def backward(engine, loss: torch.Tensor, is_last: bool) -> None:
    """Backward of one micro-batch's share of the loss (already divided by the step's total); `update` follows the last. All ranks."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
    if not is_last:
        engine.step()  # only counts


def apply_update(engine, largest_norm: float) -> tuple[float, bool]:
    """The optimizer step, unless the gradient norm is above `largest_norm` or not finite: then weights and optimizer stay. All ranks.

    Returns the global gradient norm before clipping (at nan or infinity DeepSpeed says inf), and whether the step was applied.
    """
    engine.fp32_grad_norm = _fp32_grad_norm(engine)
    engine.gate.largest_norm = largest_norm
    engine.step()
    applied = engine.was_step_applied() and engine.gate.is_open()
    if not applied and getattr(engine.optimizer, "cpu_offload", False):
        # DeepSpeed 0.19.8 forgets a refused step's gradients at ZeRO-1 and 2, except with an offloaded optimizer: a nan would stay for good
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None
    return grad_norm(engine), applied


def grad_norm(engine) -> float:
    """Global gradient norm of the current or last step, before clipping."""
    if engine.fp32_grad_norm is not None:
        return float(engine.fp32_grad_norm)
    return float(engine.optimizer._global_grad_norm)


def _fp32_grad_norm(engine) -> torch.Tensor | None:
    """DeepSpeed reports none for float32 at ZeRO-0, where each rank holds all averaged gradients: computed here."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None  # DeepSpeed computes it in its optimizer
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
