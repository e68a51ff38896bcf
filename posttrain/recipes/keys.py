"""Recipes: what is trained, as typed YAML plus --key=value overrides.

The recipe fixes the loss curve; hardware settings only decide how fast it is computed. Each key is documented once, at its field, and
`--help` prints that text. An unknown key, a wrong type or an option that the run would not read is an error.
"""

import re
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from posttrain.common import places
from posttrain.objectives.losses import LOSSES

MOST = 2**31 - 1  # of steps, tokens, examples and seconds: libraries count them in 32 bits
Positive = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Count = Annotated[int, Field(gt=0, le=MOST)]
Period = Annotated[int, Field(ge=0, le=MOST)]  # in optimizer steps; 0 = off
Fraction = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[
    str, Field(min_length=1), BeforeValidator(lambda value: places.expanded(value) if isinstance(value, str) else value)
]  # a path, or a hub name


def _seconds(value):
    """Turn 8h, 90m, 45s or 08:00:00 into seconds; anything else is left to pydantic."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?)([hms])", value.strip())):
        return float(found[1]) * {"h": 3600, "m": 60, "s": 1}[found[2]]
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+):(\d\d):(\d\d)", value.strip())):
        return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])
    return value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0, le=MOST)]


# when an existing run may be given another value of a key; same content: another path to the same weights, data or tokenizer
NEVER, BY_EXTEND, SAME_CONTENT, ANY_TIME = "never", "by extend", "same content", "any time"


def key(default, meaning: str, *, changes: str = NEVER, needs: tuple[str, ...] = (), **limits):
    """Declare a key of a recipe.

    `changes`: when an existing run may be given another value. Never is the rule, since the loss curve depends on the key.
    `needs`: keys without which this one is not read, as "one" or "one|other"; setting it while they are off (0, False, None) is an error.
    """
    return Field(default, description=meaning, json_schema_extra={"changes": changes, "needs": list(needs)}, **limits)


def nature(field: FieldInfo) -> dict:
    """Return what `key` was told of a field besides its default and meaning: `changes` and `needs`."""
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def free_key(default, meaning: str, **others):
    """Declare a key that only decides speed, memory or what is shown: an existing run may go on with another value of it."""
    return key(default, meaning, changes=ANY_TIME, **others)


AUTO = "auto"  # the value of a key that leaves the choice to the planner


class Recipe(BaseModel):
    """The keys that SFT and DPO share. All intervals count optimizer steps, the first of which is step 1."""

    kind: ClassVar[str]  # "sft" or "dpo", as prepared data and run directories are marked
    usual_epochs: ClassVar[float]  # the length of a run for which neither epochs nor max_iters is given
    example_data: ClassVar[str]  # a dataset of the hub that suits it, for error messages

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    out_dir: Place = free_key(..., "run directory; giving the same command again resumes the run in it")
    tokenizer: Place | None = key(
        None,
        "a Hugging Face folder or a SentencePiece .model file; None: the one beside the checkpoint, else the one in the prepared data",
        changes=SAME_CONTENT,
    )

    global_batch_size: Count | None = key(None, "examples (SFT rows or DPO pairs) per optimizer step, all GPUs together")
    batch_size: Count | None = free_key(
        None, "instead of global_batch_size, which becomes batch_size x gradient_accumulation_steps x number of GPUs"
    )
    gradient_accumulation_steps: Count | None = free_key(
        None, "see batch_size; it only sets the examples per step: micro-batches are cut by max_tokens_per_gpu"
    )
    max_tokens_per_gpu: Count | Literal["auto"] = free_key(
        16384,
        "most tokens in a micro-batch on one GPU, or auto: as many as fit into memory; changes speed and memory, never the loss curve",
    )

    max_iters: Count | None = key(None, "length of the run in optimizer steps, instead of epochs", changes=BY_EXTEND)
    epochs: Positive | None = key(
        None, "length of the run in passes over the training data; None, and no max_iters: 3 in SFT, 1 in DPO", changes=BY_EXTEND
    )
    learning_rate: Positive = key(2e-5, "peak learning rate")
    min_lr: NotNegative = key(0.0, "learning rate at the end of the cosine decay", needs=("decay_lr",))
    warmup_iters: Period | None = key(0, "optimizer steps of linear learning-rate warmup; give this or warmup_ratio")
    warmup_ratio: Fraction | None = key(
        None, "learning-rate warmup as a share of the run's steps, e.g. 0.03; of those that it was begun with, where it is extended"
    )
    lr_decay_iters: Count | None = key(
        None, "optimizer step after which the cosine has reached min_lr; None: the run's last step", changes=BY_EXTEND, needs=("decay_lr",)
    )
    decay_lr: bool = key(True, "decay the learning rate along a cosine after warmup; False: keep it at learning_rate")
    weight_decay: NotNegative = key(0.01, "AdamW weight decay, applied to weight matrices, not to norms and biases")
    beta1: Fraction = key(0.9, "AdamW beta1, the decay rate of the first moment")
    beta2: Fraction = key(0.95, "AdamW beta2, the decay rate of the second moment")
    grad_clip: NotNegative = key(1.0, "clip the global gradient norm to this value; 0 = no clipping")
    skip_spikes: float = key(
        20.0,
        "skip a step whose gradient norm is over this many times the median of the last 50 (once there are 20) "
        "and over all before it; 0 = off",
        ge=0,
    )
    dropout: Fraction = key(
        0.0, "attention dropout; above 0 the loss curve also depends on the number of GPUs and the micro-batches. It must be 0 in DPO"
    )
    dtype: Literal["bfloat16", "float32"] = key(
        "bfloat16", "type of weights and activations; the optimizer keeps float32 master weights either way"
    )
    seed: int = key(1337, "random seed of the order of the data and of everything else that is random", ge=0, lt=2**31)

    eval_interval: Period = free_key(
        100, "optimizer steps between validations; there is one more before the first step and one after the last; 0 = off"
    )
    eval_iters: Period = free_key(
        0,
        "validate on the first eval_iters x global_batch_size examples; 0 = on the whole validation set",
        needs=("eval_interval|eval_only",),
    )
    eval_only: bool = free_key(False, "only validate the model, print the metrics, and exit")
    replay_step: Period = free_key(
        0, "debug a step: run its batch on the newest checkpoint before it, print each example's loss, change nothing, and exit; 0 = off"
    )
    samples: Period = free_key(
        4, "number of prompts that the model answers, greedily, at every validation; 0 = off", needs=("eval_interval",)
    )
    sample_prompts: Place | None = free_key(
        None,
        "text file with one prompt per line; None: the first prompts of the validation data",
        needs=("samples", "eval_interval"),
    )
    sample_tokens: Count = free_key(
        64,
        "longest answer to these prompts, in tokens",
        needs=("samples", "eval_interval"),
    )
    benchmarks: str | None = free_key(
        None,
        "benchmarks to run during training: arc_easy,gsm8k,... (posttrain/eval_benchmarks.py --help lists them)",
        needs=("eval_interval|benchmark_interval",),
    )
    benchmark_interval: Count | None = free_key(
        None,
        "optimizer steps between runs of the benchmarks; also before the first step and after the last; None: at every validation",
        needs=("benchmarks",),
    )
    benchmark_samples: Count = free_key(100, "number of items of each benchmark: its first ones", needs=("benchmarks",))
    benchmark_data: Place | None = free_key(
        None, "folder with the benchmarks' files (arc_easy.jsonl, ...); None: load them from the Hugging Face hub", needs=("benchmarks",)
    )
    log_interval: Count = free_key(1, "optimizer steps between lines in the terminal; metrics.jsonl and TensorBoard get every step")
    save_interval: Period = free_key(500, "optimizer steps between checkpoints; 0 = only at the end")
    save_seconds: Period = free_key(0, "also save a checkpoint when the last one is this many seconds old; 0 = off")
    keep_checkpoints: Count = free_key(2, "number of newest checkpoints to keep; the one with the lowest validation loss is kept besides")
    time_limit: Seconds = free_key(
        0.0, "longest duration of the job (8h, 90m, 08:00:00 or seconds): the run saves and stops before it is over; 0 = no limit"
    )
    watchdog_seconds: Period = free_key(
        300, "end the run when a rank gives no sign of life, or no rank makes progress, for this many seconds; 0 = off"
    )
    extend: bool = free_key(False, "make an existing run longer: give a larger max_iters or epochs, and if need be another lr_decay_iters")
    wandb_log: bool = free_key(False, "also log to Weights & Biases")
    wandb_project: str = free_key("posttrain", "Weights & Biases project", needs=("wandb_log",))
    wandb_run_name: str | None = free_key(None, "Weights & Biases run name; None: the name of out_dir", needs=("wandb_log",))

    ds_config: Place = free_key(
        AUTO,
        "DeepSpeed JSON file (ZeRO stage, offload, communication), or auto: the fastest one of ds_configs/ that fits into memory; batch "
        "size, optimizer and precision come from the recipe",
    )
    packing: bool = free_key(True, "put several examples into a micro-batch, where none sees another; False: one each, which is slower")
    activation_checkpointing: Literal["auto", "none", "selective", "full", "offload"] = free_key(
        AUTO,
        "recompute activations in backward, which saves memory and costs time: none, selective (feed-forward blocks), full (whole layers), "
        "offload (whole layers, whose inputs are kept in host memory); auto: as little as memory allows",
    )
    trust_remote_code: bool = key(False, "run code that comes with a model of a type that transformers does not know: read it first")
    compile: bool = free_key(False, "apply torch.compile to each decoder layer")
    kernels: Literal["auto", "torch"] = free_key("auto", "auto: the fastest kernels that work on this machine; torch: plain PyTorch")
    deterministic: bool = free_key(
        False,
        "take only algorithms that give the same bits each time, on the same machine in the same layout; slower on GPUs; all are on CPUs",
    )
    checks: Literal["on", "off"] = free_key(
        "on", "before step 1 check the GPUs, packing, dropout, DPO's reference and the chat template; off is recorded in the run"
    )

    @classmethod
    def keys_that_change(cls, when: str) -> set[str]:
        """Return the names of the keys that may change in an existing run; `when` is ANY_TIME, SAME_CONTENT or BY_EXTEND."""
        return {name for name, field in cls.model_fields.items() if nature(field)["changes"] == when}

    @property
    def model_path(self) -> str:
        """Where training starts from."""
        raise NotImplementedError

    def at(self, model_path: str) -> Self:
        """Return this recipe, but for another path to the model."""
        raise NotImplementedError

    @property
    def data_dir(self) -> str:
        """Where the prepared data is."""
        raise NotImplementedError

    @property
    def how_to_make_model(self) -> str:
        """What to do if there is no model at model_path, for error messages."""
        raise NotImplementedError

    @property
    def benchmark_names(self) -> list[str]:
        """The names in `benchmarks`, in their order."""
        return [name.strip() for name in (self.benchmarks or "").split(",") if name.strip()]

    @property
    def only_looks(self) -> bool:
        """Whether the command trains nothing and writes nothing: eval_only or replay_step."""
        return self.eval_only or bool(self.replay_step)

    @field_validator("*", mode="before")
    @classmethod
    def _normalize(cls, value, info):
        """Read none and null as None; refuse a bool as a number, which Python would allow."""
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
    usual_epochs: ClassVar[float] = 3.0
    example_data: ClassVar[str] = "alpaca"
    checkpoint_path: Place = key(
        ..., "base model: a Hugging Face folder or hub name, a ckpt.pt file, or a checkpoint of a run", changes=SAME_CONTENT
    )
    sft_data_dir: Place = key(..., "folder with data that data_prep/prepare_sft.py has made", changes=SAME_CONTENT)

    @property
    def model_path(self) -> str:
        """Where training starts from."""
        return self.checkpoint_path

    def at(self, model_path: str) -> Self:
        """Return this recipe, but for another path to the model."""
        return self.model_copy(update={"checkpoint_path": model_path})

    @property
    def data_dir(self) -> str:
        """Where the prepared data is."""
        return self.sft_data_dir

    @property
    def how_to_make_model(self) -> str:
        """What to do if there is no model at model_path, for error messages."""
        return (
            "Name the base model with --checkpoint_path=PATH: a Hugging Face folder or hub name, or a ckpt.pt file; for example\n"
            "    hf download Qwen/Qwen3-1.7B-Base --local-dir checkpoints/qwen3_1.8b"
        )


class DPORecipe(Recipe):
    """Direct Preference Optimization."""

    kind: ClassVar[str] = "dpo"
    usual_epochs: ClassVar[float] = 1.0
    example_data: ClassVar[str] = "ultrafeedback"
    sft_checkpoint_path: Place = key(
        ...,
        "SFT model, from which the policy starts and which is the frozen reference; in the same forms as a base model, e.g. RUN/final",
        changes=SAME_CONTENT,
    )
    dpo_data_dir: Place = key(..., "folder with data that data_prep/prepare_dpo.py has made", changes=SAME_CONTENT)
    learning_rate: Positive = key(5e-7, "peak learning rate")
    loss: Literal[*LOSSES] = key(  # ty: ignore[invalid-type-form]
        "sigmoid", "preference loss; posttrain/objectives/losses.py has the equation and paper of each"
    )
    beta: Positive = key(
        0.1,
        "beta of the loss: a larger one keeps the policy closer to the reference; usually 0.05 to 0.5, for sigmoid_norm and simpo 1 to 20",
    )
    label_smoothing: float = key(
        0.0,
        "assumed share of preference labels that are wrong (with sigmoid this is conservative DPO); for exo_pair its epsilon",
        ge=0,
        lt=0.5,
    )
    simpo_gamma: NotNegative = key(0.5, "SimPO's gamma, the target margin between the two rewards")
    ld_alpha: float = key(
        1.0,
        "LD-DPO's alpha, the weight of those tokens of an answer that exceed the other's length; 1 = plain DPO, lower = length counts less",
        ge=0,
        le=1,
    )
    chosen_nll_weight: NotNegative = key(
        0.0, "add this many times the SFT loss (mean per token) of the chosen answers, which keeps them likely"
    )
    reference_free: bool = key(False, "assume a uniform reference, so that no reference model is loaded")
    reference: Literal["beside", "precompute"] = free_key(
        "beside",
        "beside: keep the reference model loaded beside the policy; precompute: compute its log-probs once, into DPO_DATA_DIR/reference, "
        "or OUT_DIR/reference where that cannot be written",
    )
    share_prompt: bool = free_key(True, "compute a pair's prompt once for both answers; changes speed only")

    @field_validator("loss", mode="before")
    @classmethod
    def _refuse_bare_ipo(cls, value):
        """Ask which of the two losses that are called IPO is meant."""
        if value == "ipo":
            raise ValueError("there are two: ipo_sum sums log-probs over tokens (the paper, OpenRLHF), ipo_mean averages them (TRL's ipo)")
        return value

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference model."""
        return "reference" in LOSSES[self.loss].reads and not self.reference_free

    @property
    def objective(self) -> dict:
        """The keyword arguments of objectives.preference.DPO."""
        names = ("loss", "beta", "label_smoothing", "simpo_gamma", "ld_alpha", "chosen_nll_weight", "reference_free")
        return {name: getattr(self, name) for name in names}

    @property
    def model_path(self) -> str:
        """Where training starts from."""
        return self.sft_checkpoint_path

    def at(self, model_path: str) -> Self:
        """Return this recipe, but for another path to the model."""
        return self.model_copy(update={"sft_checkpoint_path": model_path})

    @property
    def data_dir(self) -> str:
        """Where the prepared data is."""
        return self.dpo_data_dir

    @property
    def how_to_make_model(self) -> str:
        """What to do if there is no model at model_path, for error messages."""
        how = places.command("sft", ranks=8)
        return f"It is the result of SFT; make it with\n    {how}\nor name one with --sft_checkpoint_path=PATH"
