"""DeepSpeed's configuration: checks a ds_configs/*.json, and merges it with the recipe."""

import json
import reprlib

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from posttrain.common.errors import first_line, nearest
from posttrain.common.files import read_object
from posttrain.common.places import find_ds_config
from posttrain.parallel.launched import read_launch
from posttrain.recipes.keys import Recipe

# Keys that a ds_config may have, with their types. DeepSpeed does not check its top level: it silently ignores a misspelt key.
JSON_KEYS = {
    "zero_optimization": dict,
    "zero_force_ds_cpu_optimizer": bool,
    "zero_allow_untested_optimizer": bool,
    "activation_checkpointing": dict,
    "aio": dict,
    "comms_logger": dict,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "flops_profiler": dict,
}
REFERENCE = "ds_configs/zero3_inference.json"  # of DPO's frozen reference, whatever the policy's is
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
# Settings that would change the loss curve, and how. The curve is the recipe's alone.
CHANGE_THE_CURVE = {
    "communication_data_type": "gradients would be rounded to another type than the recipe's dtype on their way between ranks",
    "zero_quantized_weights": "weights would be rounded to 8 bits on their way between ranks",
    "zero_quantized_nontrainable_weights": "weights would be rounded to 8 bits on their way between ranks",
    "zero_quantized_gradients": "gradients would be rounded to 4 bits on their way between ranks",
}
# Settings of zero_optimization that only decide where states lie, and when and in which pieces they are sent; names without "stage3_"
KEEP_THE_CURVE = {
    *("stage", "offload_optimizer", "offload_param", "zero_hpz_partition_size", "leaf_module", "sub_group_size"),
    *("contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce", "overlap_comm"),
    *("allgather_partitions", "allgather_bucket_size", "allgather_sequential", "use_all_reduce_for_fetch_params"),
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance"),
    *("module_granularity_threshold", "memory_efficient_linear", "parameter_alignment", "ignore_unused_parameters"),
    *("gather_16bit_weights_on_model_save", "load_from_fp32_weights", "pipeline_loading_checkpoint", "override_module_apply"),
    *("log_trace_cache_warnings", "enable_sanity_checks"),
}
# Keys of the sections that DeepSpeed does not check, with their types; it checks zero_optimization itself.
SECTION_KEYS = {
    "activation_checkpointing": {
        "partition_activations": bool,
        "contiguous_memory_optimization": bool,
        "cpu_checkpointing": bool,
        "number_checkpoints": int,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool, "prof_ops": list},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": (int, float),
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
}
TYPES = {dict: "an object of its settings", bool: "true or false", int: "a whole number", list: "a list", str: "a text"}
FROM_1 = {"reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "zero_hpz_partition_size"}  # DeepSpeed takes 0, too


def read_ds_config(path: str) -> dict:
    """Reads and checks a ds_config, by its path, or by the name of a shipped one.

    Raises FileNotFoundError, or ValueError for keys that the recipe owns, that DeepSpeed does not know, or that are left at "auto".
    """
    config = read_object(find_ds_config(path))
    for name in config:
        if name in RECIPE_OWNS:
            raise ValueError(f"{path} sets {name}, which belongs to the recipe: remove it there and set {RECIPE_OWNS[name]} instead")
        if name in CHANGE_THE_CURVE:
            raise ValueError(f"{path} sets {name}: {CHANGE_THE_CURVE[name]}, which changes the loss curve; remove it")
        if name not in JSON_KEYS:
            raise ValueError(f"{path} sets {name}, which is not a sharding, offload or communication key.{nearest(name, JSON_KEYS)}")
    if '"auto"' in json.dumps(config):
        raise ValueError(f'{path} holds "auto", which only Hugging Face\'s Trainer resolves: DeepSpeed would silently use a default')
    _check_types(path, config, JSON_KEYS)
    for section, known in SECTION_KEYS.items():
        if unknown := config.get(section, {}).keys() - known.keys():
            raise ValueError(f"{path}: {section} has no key {min(unknown)}.{nearest(min(unknown), known)}")
        _check_types(f"{path}: {section}", config.get(section, {}), known)
    _check_zero(path, config.get("zero_optimization", {}))
    return config


def _check_types(where: str, values: dict, types: dict) -> None:
    """Raises ValueError naming the first value that is of another type than `types` says for its key; a number may be null."""
    for name, value in values.items():
        expected = types[name]
        is_right = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
        if not is_right and not (value is None and expected in (int, str)):
            raise ValueError(f"{where}: {name} should be {TYPES.get(expected, 'a number')}, saw {value!r}")


def _check_zero(path: str, section: dict) -> None:
    """Raises ValueError if the zero_optimization section is invalid, or asks for something that training here does not support."""
    if old := [name for name in ("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory") if name in section]:
        raise ValueError(f"{path}: {old[0]} is DeepSpeed's old spelling; use offload_optimizer or offload_param")
    try:
        zero = DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise ValueError(f"{path}: {place} is not accepted by DeepSpeed: {first['msg']}, saw {reprlib.repr(first['input'])}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: zero_optimization is not accepted by DeepSpeed: {first_line(error)}") from None
    if too_small := [name for name in FROM_1 if getattr(zero, name) < 1]:
        raise ValueError(f"{path}: {too_small[0]} should be 1 or more, saw {getattr(zero, too_small[0])}")
    offload = section.get("offload_optimizer") or {}
    if zero.zenflow is not None or offload.get("super_offload") or offload.get("ratio", 1) != 1:
        # these step optimizers of their own, which would escape the learning-rate schedule and the check for bad steps
        raise ValueError(f"{path}: zenflow, super_offload and an offload ratio other than 1 are not supported; remove them")
    if "nvme" in (offload.get("device"), (section.get("offload_param") or {}).get("device")):
        raise ValueError(f"{path}: offload to nvme is not supported: its state would not be in the checkpoints. Offload to cpu")
    if zero.round_robin_gradients or zero.elastic_checkpoint:
        # DeepSpeed 0.19.8 maps parameters to wrong parts with the first, and writes checkpoints in another format with the second
        raise ValueError(f"{path}: round_robin_gradients and elastic_checkpoint are not supported: checkpoints would be wrong. Remove them")
    if not zero.compute_grad_norm:
        raise ValueError(f"{path}: compute_grad_norm: false leaves no gradient norm to clip, log or judge a step by; remove it")
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        if name not in KEEP_THE_CURVE and getattr(zero, name) != field.get_default(call_default_factory=True):
            how = CHANGE_THE_CURVE.get(name, "it is not known to leave the numbers as they are")
            raise ValueError(f"{path}: zero_optimization sets {name}: {how}, and the loss curve is the recipe's alone; remove it")
    if type(section.get("stage", 0)) is not int:
        raise ValueError(f"{path}: stage should be the number 0, 1, 2 or 3, saw {section['stage']!r}")
    if (zero.offload_optimizer is not None and zero.stage == 0) or (zero.offload_param is not None and zero.stage < 3):
        raise ValueError(
            f"{path}: stage {zero.stage} would not read its offload section: optimizer states can be offloaded from stage 1 on, parameters "
            "only at stage 3"
        )


def offloads_optimizer(json_config: dict) -> bool:
    """Whether a ds_config keeps the optimizer's states, and updates the weights, on the CPU."""
    offload = json_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def merge_config(recipe: Recipe, json_config: dict) -> dict:
    """Returns DeepSpeed's whole configuration, from a recipe and its checked ds_config. Raises ValueError if they contradict each other."""
    if "activation_checkpointing" in json_config and recipe.activation_checkpointing != "full":
        raise ValueError(
            f"{recipe.ds_config} says how to checkpoint activations, but the recipe says activation_checkpointing: "
            f"{recipe.activation_checkpointing}. Set it to full, the only one that the section applies to, or remove the section"
        )
    node, world_size = json_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1), read_launch().world_size
    if world_size % node:
        raise ValueError(
            f"{recipe.ds_config}: zero_hpz_partition_size {node}, the GPUs of a node, does not divide the {world_size} of this run. Set it "
            "to the number of GPUs in each node; on one node use ds_configs/zero3.json"
        )
    config = {
        **json_config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # TrainingEngine.backward sets every accumulation boundary itself
        "gradient_clipping": recipe.grad_clip,
        # at ZeRO-1 a gradient is freed as soon as it is added to its float32 sum: 2 bytes a parameter less
        "bf16": {"enabled": recipe.dtype == "bfloat16", "immediate_grad_update": recipe.dtype == "bfloat16"},
        "steps_per_print": None,
    }
    if accumulates_in_fp32(recipe, json_config):
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # by default DeepSpeed accumulates in bfloat16
    return config


def accumulates_in_fp32(recipe: Recipe, json_config: dict) -> bool:
    """Whether gradients of several micro-batches add up in float32: not at ZeRO-0 in bfloat16, where DeepSpeed 0.19.8 refuses to."""
    return recipe.dtype == "float32" or json_config.get("zero_optimization", {}).get("stage", 0) > 0


def checkpoint_function(recipe: Recipe, json_config: dict):
    """Configure DeepSpeed's activation checkpointing and return its function; None if torch's is to be used.

    DeepSpeed's is used if the ds_config has a section for it, or the recipe says "offload". Raises ValueError where it would not work.
    """
    config = merge_config(recipe, json_config)
    if recipe.activation_checkpointing == "offload":
        config["activation_checkpointing"] = {"cpu_checkpointing": True}
    if "activation_checkpointing" not in config:
        return None
    if recipe.compile:
        raise ValueError(
            "compile does nothing within DeepSpeed's activation checkpointing (0.19.8), which offload and a section in JSON use. "
            "Leave compile out, or use activation_checkpointing: full without a section"
        )
    if config["activation_checkpointing"].get("cpu_checkpointing") and get_accelerator().device_name() == "cpu":
        # DeepSpeed 0.19.8 would "copy" an activation, then empty the original, which on a CPU is the same tensor
        raise ValueError(
            "activation_checkpointing: offload (cpu_checkpointing in JSON) moves activations from a GPU to the CPU; here the model is on "
            "the CPU. Use full"
        )
    # without this call the section would do nothing: the engine never reads it
    deepspeed.checkpointing.configure(None, deepspeed_config=config)
    return deepspeed.checkpointing.checkpoint
