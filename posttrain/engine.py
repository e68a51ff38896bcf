"""DeepSpeed engines from a recipe and a JSON file: the one place where the two are merged, and the one that knows DeepSpeed's inside.

How a step's loss is scaled. DeepSpeed averages gradients over W ranks; wanted is the gradient of sum(losses) / total over all ranks
and micro-batches. So each micro-batch contributes loss_sum * W / total with scale_wrt_gas=False, and only the last one of a step
is a gradient-accumulation boundary: any number of micro-batches a step, in every ZeRO stage.
"""

import contextlib
import gc
import io
import json
import logging
import math
import os
import warnings
from importlib.metadata import version
from pathlib import Path

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from packaging.version import Version
from torch import distributed as dist

from posttrain import ranks
from posttrain.config import REPOSITORY, Recipe, nearest
from posttrain.layers import as_saved

# 0.18.3 to 0.19.5 divide gradients by the accumulation count twice below ZeRO-3; 0.18.2 is wrong at ZeRO-2 (DeepSpeed #7718, #8224).
# Adam hides it; clipping and gradient norms do not.
OLDEST_DEEPSPEED = "0.19.8"

# What a ds_config may say. DeepSpeed's top level is an unchecked dict: it takes a misspelt key in silence.
JSON_KEYS = {
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
    "activation_checkpointing",
    "communication_data_type",
    "aio",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
}
RECIPE_OWNS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "max_tokens_per_gpu",
    "gradient_accumulation_steps": "global_batch_size",
    "optimizer": "learning_rate, weight_decay, beta1 and beta2",
    "scheduler": "learning_rate, min_lr, warmup_iters and lr_decay_iters",
    "gradient_clipping": "grad_clip",
    "bf16": "dtype",
    "bfloat16": "dtype",
    "fp16": "dtype",
    "amp": "dtype",
    "data_types": "dtype",
    "torch_autocast": "dtype",
    "tensorboard": "out_dir",
    "wandb": "wandb_log",
    "csv_monitor": "out_dir",
    "steps_per_print": "log_interval",
}
# The keys of sections that DeepSpeed does not check; zero_optimization it checks itself.
SECTION_KEYS = {
    "activation_checkpointing": {
        "partition_activations",
        "contiguous_memory_optimization",
        "cpu_checkpointing",
        "number_checkpoints",
        "synchronize_checkpoint_boundary",
        "profile",
    },
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "comms_logger": {"enabled", "verbose", "prof_all", "debug", "prof_ops"},
    "flops_profiler": {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"},
}


def check_versions() -> None:
    """Refuse a DeepSpeed that computes wrong gradients."""
    if Version(version("deepspeed")) < Version(OLDEST_DEEPSPEED):
        raise ValueError(
            f"deepspeed {version('deepspeed')} scales gradients wrongly under accumulation; "
            f"{OLDEST_DEEPSPEED} or newer is needed: pip install -c constraints.txt deepspeed"
        )


def launch_shape() -> tuple[int, int]:
    """Rank and world size from the launcher's environment; alone without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start_distributed(watchdog_seconds: float = 0.0) -> torch.device:
    """Meet the other ranks, watch them from then on, and take this rank's device. All ranks.

    Raises ValueError where ranks do not come, or cannot connect to each other.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        check_devices(int(os.environ.get("LOCAL_SIZE", "1")), torch.cuda.device_count())
    if "RANK" not in os.environ:  # started without a launcher; port 0 lets the system choose a free one
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if accelerator.device_name() == "cpu":
        _share_cores(int(os.environ.get("LOCAL_SIZE", "1")), int(os.environ["RANK"]))
        _limit_kernel_caches()
    _quiet_libraries()
    device = torch.device(accelerator.current_device_name())
    if not dist.is_initialized():
        ranks.connect(accelerator.communication_backend_name(), device, watchdog_seconds, *launch_shape())
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed 0.19.8 prints a line a rank about an op that it has loaded
        deepspeed.init_distributed(verbose=False)
    if accelerator.device_name() == "cpu":
        _unlink_shared_memory()
    return device


def _unlink_shared_memory() -> None:
    """DeepSpeed 0.19.8's all-reduce on CPUs leaves its buffers in /dev/shm after the run: 66 MB of memory a rank and start, for good.

    Once every rank has mapped them they need no name, and without one they go with the processes. All ranks.
    """
    dist.barrier()
    buffer = f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{os.environ['RANK']}"
    for path in Path("/dev/shm").glob(buffer):
        path.unlink(missing_ok=True)


def _share_cores(local_size: int, rank: int) -> None:
    """Without this every rank would start a thread on every core."""
    cores = len(os.sched_getaffinity(0))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // local_size))
    if local_size > cores and rank == 0:
        print(f"warning  {local_size} ranks share {cores} cores: right, but slow", flush=True)


def _limit_kernel_caches() -> None:
    """Before the first product. oneDNN, and torch (2.13) above it, keep 1,024 bfloat16 kernels, each for one number of rows.

    Every micro-batch has another, so that came to gigabytes and to no speed: the layers of one micro-batch share some twenty.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _quiet_libraries() -> None:
    """Their progress is not the run's: warnings and errors stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # 0.8.5 warns of each kind of device whose kernels are not installed
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed 0.19.8 calls deprecated collectives


def check_devices(wanted: int, visible: int) -> None:
    if wanted > visible:
        raise ValueError(f"--num_gpus asks for {wanted} GPUs on this machine, {visible} are visible; use --num_gpus {visible} or fewer")


def read_ds_config(path: str) -> dict:
    """A checked ds_configs/*.json. Raises ValueError for keys that the recipe owns, that DeepSpeed does not know, or left at "auto"."""
    place = Path(path) if Path(path).is_file() else REPOSITORY / path
    if not place.is_file():
        shipped = ", ".join(sorted(p.name for p in (REPOSITORY / "ds_configs").glob("*.json")))
        raise FileNotFoundError(f"there is no ds_config at {path}. Shipped in ds_configs: {shipped}")
    try:
        config = json.loads(place.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} should hold a JSON object, saw {type(config).__name__}")
    for name in config:
        if name in RECIPE_OWNS:
            raise ValueError(f"{path} sets {name}, which belongs to the recipe: remove it there and set {RECIPE_OWNS[name]} instead")
        if name not in JSON_KEYS:
            raise ValueError(f"{path} sets {name}, which is not a sharding, offload or communication key.{nearest(name, JSON_KEYS)}")
    if '"auto"' in json.dumps(config):
        raise ValueError(f'{path} holds "auto", which only Hugging Face\'s Trainer resolves: DeepSpeed would take a default in silence')
    for section in ("zero_optimization", *SECTION_KEYS):
        if not isinstance(config.get(section, {}), dict):
            raise ValueError(f"{path}: {section} should be an object of its settings, saw {config[section]!r}")
    for section, known in SECTION_KEYS.items():
        if unknown := set(config.get(section, {})) - known:
            raise ValueError(f"{path}: {section} has no key {min(unknown)}.{nearest(min(unknown), known)}")
    _check_zero(path, config.get("zero_optimization", {}))
    return config


def _check_zero(path: str, section: dict) -> None:
    if old := [name for name in ("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory") if name in section]:
        raise ValueError(f"{path}: {old[0]} is DeepSpeed's old spelling; use offload_optimizer or offload_param")
    try:
        zero = DeepSpeedZeroConfig(**section)
    except ValueError as error:
        raise ValueError(f"{path}: zero_optimization is not accepted by DeepSpeed: {error}") from None
    offload = section.get("offload_optimizer") or {}
    if zero.zenflow is not None or offload.get("super_offload") or offload.get("ratio", 1) != 1:
        # these step optimizers of their own, which neither the learning rate nor the check of a bad step would reach
        raise ValueError(f"{path}: zenflow, super_offload and an offload ratio other than 1 are not supported; remove them")
    if "nvme" in (offload.get("device"), (section.get("offload_param") or {}).get("device")):
        raise ValueError(f"{path}: offload to nvme is not supported: its state would not be in the checkpoints. Offload to cpu")
    if zero.round_robin_gradients or zero.elastic_checkpoint:
        # DeepSpeed 0.19.8 maps parameters wrongly to their parts with the first, and writes checkpoints of another form with the second
        raise ValueError(f"{path}: round_robin_gradients and elastic_checkpoint are not supported: checkpoints would be wrong. Remove them")
    if not zero.compute_grad_norm:
        raise ValueError(f"{path}: compute_grad_norm: false leaves no gradient norm to clip, log or judge a step by; remove it")
    if not isinstance(section.get("stage", 0), int):
        raise ValueError(f"{path}: stage should be the number 0, 1, 2 or 3, saw {section['stage']!r}")
    if (zero.offload_optimizer is not None and zero.stage == 0) or (zero.offload_param is not None and zero.stage < 3):
        raise ValueError(f"{path}: stage {zero.stage} would not read its offload section: optimizer states from stage 1, parameters at 3")


def merge(recipe: Recipe, json_config: dict) -> dict:
    """DeepSpeed's whole configuration."""
    if "activation_checkpointing" in json_config and recipe.activation_checkpointing != "full":
        raise ValueError(
            f"{recipe.ds_config} says how to checkpoint activations, but the recipe says activation_checkpointing: "
            f"{recipe.activation_checkpointing}. Set it to full, the only one that the section applies to, or remove the section"
        )
    node, world_size = json_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1), launch_shape()[1]
    if world_size % node:
        raise ValueError(
            f"{recipe.ds_config}: zero_hpz_partition_size {node}, the GPUs of a node, does not divide the {world_size} of this run. Set it "
            "to what each node has; on one node use ds_configs/zero3.json"
        )
    config = {
        **json_config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the loop sets every boundary itself
        "gradient_clipping": recipe.grad_clip,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
        "steps_per_print": None,
    }
    if accumulates_in_fp32(recipe, json_config):
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # the default accumulates in bf16
    return config


def accumulates_in_fp32(recipe: Recipe, json_config: dict) -> bool:
    """Gradients of several micro-batches add up in float32, except at ZeRO-0 in bfloat16, where DeepSpeed 0.19.8 refuses to."""
    return recipe.dtype == "float32" or json_config.get("zero_optimization", {}).get("stage", 0) > 0


def checkpoint_function(recipe: Recipe, json_config: dict):
    """DeepSpeed's activation checkpointing as its JSON section configures it, or with offload; None for torch's."""
    config = merge(recipe, json_config)
    if recipe.activation_checkpointing == "offload":
        config["activation_checkpointing"] = {"cpu_checkpointing": True}
    if "activation_checkpointing" not in config:
        return None
    if recipe.compile:
        raise ValueError(
            "compile does nothing within DeepSpeed's activation checkpointing (0.19.8), which offload and a section in JSON stand for. "
            "Leave compile out, or take activation_checkpointing: full without a section"
        )
    if config["activation_checkpointing"].get("cpu_checkpointing") and get_accelerator().device_name() == "cpu":
        # DeepSpeed 0.19.8 would take its "copy" of an activation, then empty the original, which is the same tensor here
        raise ValueError(
            "activation_checkpointing: offload (cpu_checkpointing in JSON) moves activations from a GPU to the CPU; here the model is on "
            "the CPU. Use full"
        )
    # without this call the section would do nothing: the engine never reads it
    deepspeed.checkpointing.configure(None, deepspeed_config=config)
    return deepspeed.checkpointing.checkpoint


def build_engine(policy: torch.nn.Module, recipe: Recipe, json_config: dict):
    """The training engine. All ranks."""
    config = merge(recipe, json_config)
    if not accumulates_in_fp32(recipe, json_config) and dist.get_rank() == 0:
        print(
            "warning  at ZeRO-0 in bfloat16 DeepSpeed adds up gradients in bfloat16; ds_configs/zero1.json does it in float32", flush=True
        )
    policy.train()
    optimizer = _optimizer(_parameter_groups(policy, recipe.weight_decay), recipe, json_config)
    gate = _put_gate_before(optimizer)
    engine = _initialize(recipe, policy, optimizer=optimizer, config=config)
    _undo_first_step(engine.optimizer)
    engine.gate, gate.engine = gate, engine
    return engine


def _initialize(recipe: Recipe, model, **settings):
    if recipe.compile:  # ZeRO-3 then gathers a layer as a whole, and not within it, where its hooks would break the graph
        deepspeed.utils.set_z3_leaf_modules(model, [type(model.model.base_model.layers[0])])
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed 0.19.8 prints the memory in use 4 times and more for bfloat16 at ZeRO-1
        return deepspeed.initialize(model=model, **settings)[0]


class _Gate:
    """Whether the optimizer may step. DeepSpeed knows the gradient norm only inside its own step(), so there it is asked."""

    engine = None  # until it is built; what DeepSpeed does to the optimizer before that may pass
    largest_norm = math.inf

    def is_open(self) -> bool:
        if self.engine is None:
            return True
        norm = grad_norm(self.engine)
        return math.isfinite(norm) and norm <= self.largest_norm


def _put_gate_before(optimizer: torch.optim.Optimizer) -> _Gate:
    gate, step = _Gate(), optimizer.step
    optimizer.step = lambda *args, **kwargs: step(*args, **kwargs) if gate.is_open() else None
    return gate


def _undo_first_step(optimizer) -> None:
    """DeepSpeed 0.19.8 makes the states of its bfloat16 optimizer for ZeRO-0 by a real step with zero gradients: Adam's clock would stand
    at 1 before step 1, and weight decay would have been applied once more than in any other layout."""
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.optimizer.state.clear()
        for weights, master_weights in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master_weight in zip(weights, master_weights, strict=True):
                master_weight.data.copy_(weight.data)


def build_reference(policy: torch.nn.Module, recipe: Recipe):
    """The frozen reference in its own engine: ZeRO-3, no optimizer. All ranks."""
    config = merge(recipe.model_copy(update={"activation_checkpointing": "none"}), read_ds_config("ds_configs/zero3_inference.json"))
    policy.eval().requires_grad_(False)
    engine = _initialize(recipe, policy, config={**config, "gradient_clipping": 0.0, "data_types": {}})
    engine.eval()
    return engine


def free(engine) -> None:
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


def backward(engine, loss: torch.Tensor, is_last: bool) -> None:
    """Backward of one micro-batch's share of the loss (already divided by the step's total); `update` follows the last. All ranks."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
    if not is_last:
        engine.step()  # only counts


def update(engine, largest_norm: float) -> tuple[float, bool]:
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


class WeightSample:
    """A fixed sample of this rank's weights: which share of them changes in a step?

    Float32 master weights keep every update, however small; the bfloat16 copies that compute change only where it crosses a rounding
    step, which is about 1/256 of a weight's size.
    """

    TENSORS, ELEMENTS = 16, 2**14

    def __init__(self, engine):
        tensors = [getattr(p, "ds_tensor", p) for p in engine.module.parameters() if p.ndim >= 2 or hasattr(p, "ds_tensor")]
        tensors = [tensor for tensor in tensors if tensor.numel() > 1]  # one that lies on an NVMe has 1
        self.tensors = tensors[:: max(1, math.ceil(len(tensors) / self.TENSORS))]
        self.device = engine.device

    def values(self) -> list[torch.Tensor]:
        flat = [tensor.detach().flatten() for tensor in self.tensors]
        return [values[:: max(1, len(values) // self.ELEMENTS)].clone() for values in flat]

    def share_changed(self, before: list[torch.Tensor]) -> float:
        """Share of the sample, over all ranks, that differs from `before`. All ranks."""
        now = self.values()
        changed = sum((a != b).sum() for a, b in zip(before, now, strict=True))
        counts = torch.tensor([float(changed), sum(map(len, now))], device=self.device)
        dist.all_reduce(counts)
        return (counts[0] / counts[1]).item()


def _fp32_grad_norm(engine) -> torch.Tensor | None:
    """DeepSpeed reports none for float32 at ZeRO-0, where each rank holds all averaged gradients: computed here."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None  # DeepSpeed computes it in its optimizer
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def forget_activations() -> None:
    """After a forward pass in training mode without a backward one: DeepSpeed's activation checkpointing counts on the two alternating."""
    if deepspeed.checkpointing.is_configured():
        deepspeed.checkpointing.reset()


def set_learning_rate(engine, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def gathered_state_dict(engine) -> dict[str, torch.Tensor] | None:
    """The wrapped model's weights by name, on the CPU of rank 0 (None elsewhere), one tensor gathered at a time. All ranks."""
    state = {}
    for name, parameter in engine.module.model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            if dist.get_rank() == 0:
                state[name] = as_saved(name, parameter.detach(), engine.module.model.config).to("cpu", copy=True)
    return state if dist.get_rank() == 0 else None


def describe_optimizer(engine) -> str:
    """The line of the first screen that says which optimizer runs, and why."""
    if isinstance(engine.basic_optimizer, deepspeed.ops.adam.DeepSpeedCPUAdam):
        return "optimizer: DeepSpeed's CPU Adam (its states are offloaded)"
    return "optimizer: torch's fused AdamW (at the limit of memory where it was measured, and nothing to compile as for DeepSpeed's)"


def _parameter_groups(policy: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices only, as usual for transformers."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    matrices, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _optimizer(groups, recipe: Recipe, json_config: dict) -> torch.optim.Optimizer:
    settings = {"lr": recipe.learning_rate, "betas": (recipe.beta1, recipe.beta2), "eps": 1e-8}
    offload = json_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **settings, adamw_mode=True)
    return torch.optim.AdamW(groups, **settings, fused=True)
