"""Recipes: what is trained, as typed YAML plus --key=value overrides.

The recipe fixes the loss curve; hardware settings only decide how fast it is drawn. Each key is documented once, at its field, and
`--help` prints that. Unknown keys, wrong types and options that the chosen mode would not read are errors.
"""

import re
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from posttrain.objectives.losses import LOSSES

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
Period = Annotated[int, Field(ge=0)]  # in optimizer steps; 0 = off
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _seconds(value):
    """8h, 90m, 45s, 08:00:00 or a number of seconds."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?)([hms])", value.strip())):
        return float(found[1]) * {"h": 3600, "m": 60, "s": 1}[found[2]]
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+):(\d\d):(\d\d)", value.strip())):
        return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])
    return value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]


NEVER, BY_EXTEND, ANY_TIME = "never", "by extend", "any time"  # when a run that is continued may be given another value


def key(default, meaning: str, *, changes: str = NEVER, needs: tuple[str, ...] = (), **limits):
    """Declare a key of a recipe.

    `changes`: when the same run may be given another value; the loss curve depends on the key, so as a rule never.
    `needs`: keys without which this one is not read, as "one" or "one|other"; to give it while they are off (0, False, none) is an error.
    """
    return Field(default, description=meaning, json_schema_extra={"changes": changes, "needs": list(needs)}, **limits)


def free_key(default, meaning: str, **others):
    """Declare a key that only decides speed, memory or what is shown: the same run may go on with any value of it."""
    return key(default, meaning, changes=ANY_TIME, **others)


AUTO = "auto"  # of max_tokens_per_gpu


class Recipe(BaseModel):
    """Keys that SFT and DPO share. One clock everywhere: the optimizer step, from 1."""

    kind: ClassVar[str]  # sft or dpo: what prepared data and run directories are marked with
    prepare: ClassVar[str]  # the command of data_prep/ that makes its data, for messages
    how_to_make_model: ClassVar[str]  # what to do where there is no model at its path, for messages

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    out_dir: str = free_key(..., "the run's directory; the same command again continues the run in it")
    tokenizer: str | None = key(None, "a Hugging Face folder or a SentencePiece .model; none: beside the checkpoint, else the data's")

    global_batch_size: Count | None = key(None, "examples (SFT rows, DPO pairs) per optimizer step, over all GPUs")
    batch_size: Count | None = free_key(None, "with gradient_accumulation_steps: global_batch_size as their product times the GPUs")
    gradient_accumulation_steps: Count | None = free_key(None, "see batch_size; sets examples per step, not how they are cut up")
    max_tokens_per_gpu: Count | Literal["auto"] = free_key(
        16384, "tokens in a micro-batch on one GPU, or auto: as many as fit; speed and memory only, never the curve"
    )

    max_iters: Count | None = key(None, "optimizer steps of the run; or give epochs", changes=BY_EXTEND)
    epochs: Positive | None = key(None, "passes over the data; or give max_iters", changes=BY_EXTEND)
    learning_rate: Positive = key(2e-5, "peak learning rate")
    min_lr: NotNegative = key(0.0, "learning rate that the cosine falls to", needs=("decay_lr",))
    warmup_iters: Period = key(0, "steps of linear warmup")
    lr_decay_iters: Count | None = key(
        None, "steps after which the cosine has reached min_lr; none: the run's", changes=BY_EXTEND, needs=("decay_lr",)
    )
    decay_lr: bool = key(True, "cosine decay after the warmup; False holds learning_rate")
    weight_decay: NotNegative = key(0.01, "AdamW weight decay, on matrices only (not on norms and biases)")
    beta1: Fraction = key(0.9, "AdamW first-moment decay")
    beta2: Fraction = key(0.95, "AdamW second-moment decay")
    grad_clip: NotNegative = key(1.0, "largest global gradient norm; 0 = no clipping")
    skip_spikes: float = key(
        20.0,
        "a gradient norm over this many times the median of the last 50 (at least 20), and over all before it, is not applied; 0 = off",
        ge=0,
    )
    dropout: Fraction = key(0.0, "attention dropout; above 0 the curve depends on the layout, and DPO refuses it")
    dtype: Literal["bfloat16", "float32"] = key("bfloat16", "weights and activations; float32 master weights are kept either way")
    seed: int = key(1337, "order of the data and every other draw", ge=0, lt=2**31)

    eval_interval: Period = free_key(100, "steps between validations, which also run at the first and the last step; 0 = off")
    eval_iters: Period = free_key(
        0, "validate on eval_iters x global_batch_size examples; 0 = the whole validation set", needs=("eval_interval|eval_only",)
    )
    eval_only: bool = free_key(False, "validate the model once, print, and stop")
    replay_step: Period = free_key(
        0, "run this step's batch alone on the newest checkpoint from before it, print each example's loss; 0 = off"
    )
    samples: Period = free_key(4, "prompts that the model answers at every validation, greedily; 0 = off", needs=("eval_interval",))
    sample_prompts: str | None = free_key(
        None,
        "a text file of prompts, one a line; none: the first ones of the validation data",
        needs=(
            "samples",
            "eval_interval",
        ),
    )
    sample_tokens: Count = free_key(
        64,
        "longest answer to them",
        needs=(
            "samples",
            "eval_interval",
        ),
    )
    benchmarks: str | None = free_key(
        None, "measured while it trains: arc_easy,gsm8k,... (see eval_benchmarks.py)", needs=("eval_interval|benchmark_interval",)
    )
    benchmark_interval: Count | None = free_key(
        None, "steps between their measurements, also first and last; none: at every validation", needs=("benchmarks",)
    )
    benchmark_samples: Count = free_key(100, "the first so many items of each", needs=("benchmarks",))
    benchmark_data: str | None = free_key(None, "folder with their files (arc_easy.jsonl ...); none: from the hub", needs=("benchmarks",))
    log_interval: Count = free_key(1, "steps between lines in the terminal; files get every step")
    save_interval: Period = free_key(500, "steps between checkpoints; 0 = only at the end")
    save_seconds: Period = free_key(0, "seconds after which a checkpoint is due even so; 0 = off")
    keep_checkpoints: Count = free_key(2, "newest checkpoints kept, besides the one with the lowest validation loss")
    time_limit: Seconds = free_key(0.0, "how long the job may last (8h, 90m, 08:00:00 or seconds): it saves and stops before; 0 = no limit")
    watchdog_seconds: Period = free_key(300, "a rank without a sign of life, or no progress anywhere, for so long ends the run; 0 = off")
    extend: bool = free_key(False, "with a larger max_iters or epochs: go on beyond the run's end; lr_decay_iters may change, too")
    wandb_log: bool = free_key(False, "also log to Weights & Biases")
    wandb_project: str = free_key("posttrain", "Weights & Biases project", needs=("wandb_log",))
    wandb_run_name: str | None = free_key(None, "Weights & Biases run name; none: the name of out_dir", needs=("wandb_log",))

    ds_config: str = free_key("ds_configs/zero1.json", "DeepSpeed JSON: sharding, offload and communication only")
    packing: bool = free_key(True, "several examples in a micro-batch; False: one each, slower")
    activation_checkpointing: Literal["none", "selective", "full", "offload"] = free_key(
        "none",
        "recompute in backward: nothing, the feed-forward blocks, or whole layers (offload: and keep their inputs in host memory); "
        "saves memory, costs time",
    )
    compile: bool = free_key(False, "torch.compile each decoder layer")
    kernels: Literal["auto", "torch"] = free_key("auto", "auto: the fastest kernels this machine has; torch: plain PyTorch ones")
    checks: Literal["on", "off"] = free_key(
        "on", "checks before step 1: packing, dropout, reference, chat template; off is written into the run"
    )

    @classmethod
    def keys_that_change(cls, when: str) -> set[str]:
        """Names of the keys that a run may be continued with other values of: ANY_TIME, or BY_EXTEND."""
        return {name for name, field in cls.model_fields.items() if field.json_schema_extra["changes"] == when}

    @property
    def benchmark_names(self) -> list[str]:
        return [name.strip() for name in (self.benchmarks or "").split(",") if name.strip()]

    @property
    def only_looks(self) -> bool:
        """Whether the command trains nothing and writes nothing."""
        return self.eval_only or bool(self.replay_step)

    @field_validator("*", mode="before")
    @classmethod
    def _no_disguises(cls, value, info):
        """YAML's None may be written none; a bool is not a number, although Python says so."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, str) and value.lower() in ("none", "null") and "none" not in get_args(annotation):
            return None
        if isinstance(value, bool) and "on" in get_args(annotation):  # YAML 1.1 reads a bare on or off as a bool
            return "on" if value else "off"
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("should be a number or a text, not a true/false value")
        return value


class SFTRecipe(Recipe):
    """Supervised fine-tuning."""

    kind: ClassVar[str] = "sft"
    prepare: ClassVar[str] = "prepare_sft.py --dataset alpaca"
    how_to_make_model: ClassVar[str] = (
        "Name the base model with --checkpoint_path=PATH: a Hugging Face folder or hub name, or a ckpt.pt file; for example\n"
        "    hf download Qwen/Qwen3-1.7B-Base --local-dir checkpoints/qwen3_1.8b"
    )

    checkpoint_path: str = key(..., "base model: a Hugging Face folder or hub name, or a ckpt.pt file")
    sft_data_dir: str = key(..., "data made by data_prep/prepare_sft.py")

    @property
    def model_path(self) -> str:
        return self.checkpoint_path

    @property
    def data_dir(self) -> str:
        return self.sft_data_dir


class DPORecipe(Recipe):
    """Direct Preference Optimization."""

    kind: ClassVar[str] = "dpo"
    prepare: ClassVar[str] = "prepare_dpo.py --dataset ultrafeedback"
    how_to_make_model: ClassVar[str] = (
        "It is the result of SFT; make it with\n    deepspeed --num_gpus 8 posttrain/sft.py\nor name one with --sft_checkpoint_path=PATH"
    )

    sft_checkpoint_path: str = key(..., "policy at step 0 and frozen reference: a Hugging Face folder or hub name, or a ckpt.pt file")
    dpo_data_dir: str = key(..., "data made by data_prep/prepare_dpo.py")
    learning_rate: Positive = key(5e-7, "peak learning rate")
    loss: Literal[*LOSSES] = key("sigmoid", "what is minimised; posttrain/objectives/losses.py has each one's equation")
    beta: Positive = key(0.1, "strength of the pull towards the reference, usually 0.05 to 0.5; sigmoid_norm and simpo 1 to 20")
    label_smoothing: float = key(0.0, "assumed share of flipped preferences (sigmoid: conservative DPO); exo_pair: epsilon", ge=0, lt=0.5)
    simpo_gamma: NotNegative = key(0.5, "simpo's target margin between the two rewards")
    ld_alpha: float = key(
        1.0, "weight of an answer's tokens beyond the other's length (LD-DPO); 1 = all alike, below 1 less for length", ge=0, le=1
    )
    chosen_nll_weight: NotNegative = key(0.0, "adds this times the mean token loss of the chosen answers; keeps them likely")
    reference_free: bool = key(False, "take the reference as uniform: no reference model")
    reference: Literal["beside", "precompute"] = free_key(
        "beside",
        "the reference's log-probs: of an engine beside the policy, or computed once, before training, into DATA/reference",
    )
    share_prompt: bool = free_key(True, "compute the prompt once for both answers; speed only")

    @field_validator("loss", mode="before")
    @classmethod
    def _name_the_convention(cls, value):
        if value == "ipo":
            raise ValueError("there are two: ipo_sum sums log-probs over tokens (the paper, OpenRLHF), ipo_mean averages them (TRL's ipo)")
        return value

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference model."""
        return "reference" in LOSSES[self.loss].reads and not self.reference_free

    @property
    def objective(self) -> dict:
        """What objectives.preference.DPO is made with, by name."""
        names = ("loss", "beta", "label_smoothing", "simpo_gamma", "ld_alpha", "chosen_nll_weight", "reference_free")
        return {name: getattr(self, name) for name in names}

    @property
    def model_path(self) -> str:
        return self.sft_checkpoint_path

    @property
    def data_dir(self) -> str:
        return self.dpo_data_dir
