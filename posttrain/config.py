"""Recipes: what is trained, as typed YAML plus --key=value overrides.

The recipe fixes the loss curve; hardware settings only decide how fast it is drawn. Each key is documented once, at its field, and
`--help` prints that. Unknown keys, wrong types and options that the chosen mode would not read are errors.
"""

import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from posttrain.losses import LOSSES

REPOSITORY = Path(__file__).resolve().parents[1]

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

# Two ways to say one thing. In one place (file or command line) they exclude each other; the command line's replaces the file's.
EXCLUSIVE = (({"max_iters"}, {"epochs"}), ({"global_batch_size"}, {"batch_size", "gradient_accumulation_steps"}))


def key(default, meaning: str, **limits):
    return Field(default, description=meaning, **limits)


AUTO = "auto"  # of max_tokens_per_gpu


class Recipe(BaseModel):
    """Keys that SFT and DPO share. One clock everywhere: the optimizer step, from 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    out_dir: str = key(..., "the run's directory; the same command again continues the run in it")
    tokenizer: str | None = key(None, "a Hugging Face folder or a SentencePiece .model; none: beside the checkpoint, else the data's")

    global_batch_size: Count | None = key(None, "examples (SFT rows, DPO pairs) per optimizer step, over all GPUs")
    batch_size: Count | None = key(None, "with gradient_accumulation_steps: global_batch_size as their product times the GPUs")
    gradient_accumulation_steps: Count | None = key(None, "see batch_size; sets examples per step, not how they are cut up")
    max_tokens_per_gpu: Count | Literal["auto"] = key(
        16384, "tokens in a micro-batch on one GPU, or auto: as many as fit; speed and memory only, never the curve"
    )

    max_iters: Count | None = key(None, "optimizer steps of the run; or give epochs")
    epochs: Positive | None = key(None, "passes over the data; or give max_iters")
    learning_rate: Positive = key(2e-5, "peak learning rate")
    min_lr: NotNegative = key(0.0, "learning rate that the cosine falls to")
    warmup_iters: Period = key(0, "steps of linear warmup")
    lr_decay_iters: Count | None = key(None, "steps after which the cosine has reached min_lr; none: the run's")
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

    eval_interval: Period = key(100, "steps between validations, which also run at the first and the last step; 0 = off")
    eval_iters: Period = key(0, "validate on eval_iters x global_batch_size examples; 0 = the whole validation set")
    eval_only: bool = key(False, "validate the model once, print, and stop")
    replay_step: Period = key(0, "run this step's batch alone on the newest checkpoint from before it, print each example's loss; 0 = off")
    samples: Period = key(4, "prompts that the model answers at every validation, greedily; 0 = off")
    sample_prompts: str | None = key(None, "a text file of prompts, one a line; none: the first ones of the validation data")
    sample_tokens: Count = key(64, "longest answer to them")
    benchmarks: str | None = key(None, "measured while it trains: arc_easy,gsm8k,... (see eval_benchmarks.py)")
    benchmark_interval: Count | None = key(None, "steps between their measurements, also first and last; none: at every validation")
    benchmark_samples: Count = key(100, "the first so many items of each")
    benchmark_data: str | None = key(None, "folder with their files (arc_easy.jsonl ...); none: from the hub")
    log_interval: Count = key(1, "steps between lines in the terminal; files get every step")
    save_interval: Period = key(500, "steps between checkpoints; 0 = only at the end")
    save_seconds: Period = key(0, "seconds after which a checkpoint is due even so; 0 = off")
    keep_checkpoints: Count = key(2, "newest checkpoints kept, besides the one with the lowest validation loss")
    time_limit: Seconds = key(0.0, "how long the job may last (8h, 90m, 08:00:00 or seconds): it saves and stops before; 0 = no limit")
    watchdog_seconds: Period = key(300, "a rank without a sign of life, or no progress anywhere, for so long ends the run; 0 = off")
    extend: bool = key(False, "with a larger max_iters or epochs: go on beyond the run's end; lr_decay_iters may change, too")
    wandb_log: bool = key(False, "also log to Weights & Biases")
    wandb_project: str = key("posttrain", "Weights & Biases project")
    wandb_run_name: str | None = key(None, "Weights & Biases run name; none: the name of out_dir")

    ds_config: str = key("ds_configs/zero1.json", "DeepSpeed JSON: sharding, offload and communication only")
    packing: bool = key(True, "several examples in a micro-batch; False: one each, slower")
    activation_checkpointing: Literal["none", "selective", "full", "offload"] = key(
        "none",
        "recompute in backward: nothing, the feed-forward blocks, or whole layers (offload: and keep their inputs in host memory); "
        "saves memory, costs time",
    )
    compile: bool = key(False, "torch.compile each decoder layer")
    kernels: Literal["auto", "torch"] = key("auto", "auto: the fastest kernels this machine has; torch: plain PyTorch ones")
    checks: Literal["on", "off"] = key(
        "on", "checks before step 1: packing, dropout, reference, chat template; off is written into the run"
    )

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

    sft_checkpoint_path: str = key(..., "policy at step 0 and frozen reference: a Hugging Face folder or hub name, or a ckpt.pt file")
    dpo_data_dir: str = key(..., "data made by data_prep/prepare_dpo.py")
    learning_rate: Positive = key(5e-7, "peak learning rate")
    loss: Literal[*LOSSES] = key("sigmoid", "what is minimised; posttrain/losses.py has each one's equation")
    beta: Positive = key(0.1, "strength of the pull towards the reference, usually 0.05 to 0.5; sigmoid_norm and simpo 1 to 20")
    label_smoothing: float = key(0.0, "assumed share of flipped preferences (sigmoid: conservative DPO); exo_pair: epsilon", ge=0, lt=0.5)
    simpo_gamma: NotNegative = key(0.5, "simpo's target margin between the two rewards")
    ld_alpha: float = key(
        1.0, "weight of an answer's tokens beyond the other's length (LD-DPO); 1 = all alike, below 1 less for length", ge=0, le=1
    )
    chosen_nll_weight: NotNegative = key(0.0, "adds this times the mean token loss of the chosen answers; keeps them likely")
    reference_free: bool = key(False, "take the reference as uniform: no reference model")
    reference: Literal["beside", "precompute"] = key(
        "beside",
        "the reference's log-probs: of an engine beside the policy, or computed once, before training, into DATA/reference",
    )
    share_prompt: bool = key(True, "compute the prompt once for both answers; speed only")

    @field_validator("loss", mode="before")
    @classmethod
    def _name_the_convention(cls, value):
        if value == "ipo":
            raise ValueError("there are two: ipo_sum sums log-probs over tokens (the paper, OpenRLHF), ipo_mean averages them (TRL's ipo)")
        return value

    @property
    def model_path(self) -> str:
        return self.sft_checkpoint_path

    @property
    def data_dir(self) -> str:
        return self.dpo_data_dir


def load_recipe(kind: type[Recipe], default: str, argv: list[str]) -> Recipe:
    """The recipe of a command line: [RECIPE.yaml] [--key=value ...]. --help prints every key and exits."""
    if {"-h", "--help"} & set(argv):
        print(help_text(kind, default))
        sys.exit(0)
    path, overrides = _split(kind, argv)
    path = path or REPOSITORY / "posttrain" / "recipes" / f"{default}.yaml"
    file = _read_yaml(path)
    _refuse_unknown(kind, file, f"{path}: ")
    return build_recipe(kind, file, overrides)


def load_recipe_of_either_kind(arguments: list[str]) -> Recipe:
    """As load_recipe, of the kind that the keys of its file say; SFT's default where no file is named."""
    file = next((Path(word) for word in arguments if not word.startswith("--")), None)
    if file and "dpo_data_dir" in _read_yaml(file):
        return load_recipe(DPORecipe, "dpo_qwen3_1.8b", arguments)
    return load_recipe(SFTRecipe, "sft_qwen3_1.8b", arguments)


def build_recipe(kind: type[Recipe], file: dict, overrides: dict) -> Recipe:
    """A checked recipe from a file's values and the command line's. Raises ValueError naming every wrong key."""
    for left, right in EXCLUSIVE:
        for place, values in (("the recipe", file), ("the command line", overrides)):
            if left & _given(values) and right & _given(values):
                raise ValueError(f"{place} sets both {_names(left & _given(values))} and {_names(right & _given(values))}; give one")
        for mine, other in ((left, right), (right, left)):
            if mine & _given(overrides):
                file = {name: value for name, value in file.items() if name not in other}
    values = {**file, **overrides}
    _refuse_unknown(kind, values)
    try:
        recipe = kind(**values)
    except ValidationError as error:
        raise ValueError(_explain(kind, error.errors())) from None
    _refuse_unread(recipe)
    return recipe


def _refuse_unread(recipe: Recipe) -> None:
    """An option that this run would not read is an error, never accepted and ignored."""
    fields = type(recipe).model_fields
    given = {name for name in recipe.model_fields_set if getattr(recipe, name) != fields[name].default}
    if recipe.epochs is None and recipe.max_iters is None:
        raise ValueError("how long to train is missing: give max_iters (optimizer steps) or epochs (passes over the data)")
    if recipe.global_batch_size is None and recipe.batch_size is None and recipe.gradient_accumulation_steps is None:
        raise ValueError("examples per step are missing: give global_batch_size, or batch_size and gradient_accumulation_steps")
    if not recipe.decay_lr and (unread := given & {"min_lr", "lr_decay_iters"}):
        raise ValueError(f"decay_lr=False holds the learning rate, so {_names(unread)} would not be read; remove it")
    if recipe.min_lr > recipe.learning_rate:
        raise ValueError(f"min_lr {recipe.min_lr:g} is above learning_rate {recipe.learning_rate:g}")
    if recipe.lr_decay_iters and recipe.lr_decay_iters <= recipe.warmup_iters:
        raise ValueError(f"lr_decay_iters {recipe.lr_decay_iters} is not after warmup_iters {recipe.warmup_iters}: no step would decay")
    if not recipe.eval_interval and not recipe.eval_only and recipe.eval_iters:
        raise ValueError("eval_iters would not be read with eval_interval=0; remove it")
    if not recipe.eval_interval and (unread := given & {"samples", "sample_prompts", "sample_tokens"}):
        raise ValueError(f"{_names(unread)} would not be read with eval_interval=0, as samples are taken at validations; remove it")
    if not recipe.eval_interval and not recipe.benchmark_interval and recipe.benchmarks:
        raise ValueError(
            "benchmarks would not be read with eval_interval=0, as they are measured at validations; give benchmark_interval, or remove it"
        )
    if not recipe.benchmarks and (unread := given & {"benchmark_samples", "benchmark_data", "benchmark_interval"}):
        raise ValueError(f"{_names(unread)} would not be read without benchmarks; remove it")
    if not recipe.samples and (unread := given & {"sample_prompts", "sample_tokens"}):
        raise ValueError(f"{_names(unread)} would not be read with samples=0; remove it")
    if not recipe.wandb_log and (unread := given & {"wandb_project", "wandb_run_name"}):
        raise ValueError(f"{_names(unread)} would not be read without wandb_log=True")
    if 0 < recipe.skip_spikes <= 1:
        raise ValueError(f"skip_spikes={recipe.skip_spikes:g} would refuse every other step: give a factor well above 1, or 0 for off")
    if recipe.eval_only and recipe.replay_step:
        raise ValueError("eval_only and replay_step are two ways not to train; give one")
    if isinstance(recipe, DPORecipe):
        _refuse_unread_by_loss(recipe, given)


def readers() -> dict[str, list[str]]:
    """Options that not all losses read, and which do."""
    read = {name: [loss for loss in LOSSES if name in LOSSES[loss].reads] for name in ("label_smoothing", "simpo_gamma", "reference")}
    read["ld_alpha"] = [loss for loss in LOSSES if "lengths" not in LOSSES[loss].reads]
    read["chosen_nll_weight"] = [loss for loss in LOSSES if loss != "orpo"]  # which has that term already
    read["reference_free"] = [loss for loss in LOSSES if LOSSES[loss].is_of_the_margin]
    return read


def _refuse_unread_by_loss(recipe: DPORecipe, given: set[str]) -> None:
    if recipe.dropout:
        raise ValueError("dropout must be 0 in DPO: policy and reference would differ before the first step")
    for name, losses in readers().items():
        if name in given and recipe.loss not in losses:
            raise ValueError(f"loss {recipe.loss} does not read {name}; remove it. It is read by {', '.join(losses)}")
    if recipe.reference_free and "reference" in given:
        raise ValueError(f"reference_free has no reference, so reference={recipe.reference} would not be read; remove one")
    if LOSSES[recipe.loss].needs_smoothing and not recipe.label_smoothing:
        example = "1e-3" if recipe.loss == "exo_pair" else "0.1"
        raise ValueError(f"loss {recipe.loss} needs a label_smoothing above 0, for example {example}")


def help_text(kind: type[Recipe], default: str) -> str:
    script = "sft" if kind is SFTRecipe else "dpo"
    lines = [
        f"deepspeed --num_gpus N posttrain/{script}.py [RECIPE.yaml] [--key=value ...]",
        f"python posttrain/{script}.py [RECIPE.yaml] [--key=value ...]        on one device",
        "",
        f"{(kind.__doc__ or '').strip()} Without RECIPE.yaml: posttrain/recipes/{default}.yaml. Keys, default, meaning:",
        "",
    ]
    for name, field in kind.model_fields.items():
        shown = "(required)" if field.is_required() else str(field.default)
        lines.append(f"  --{name + '=':<32}{shown:<24}{field.description}")
        if choices := [choice for choice in get_args(field.annotation) if isinstance(choice, str)]:
            lines.append(f"  {'':<34}{'':<24}one of: {', '.join(choices)}")
        if kind is DPORecipe and name in readers():
            lines.append(f"  {'':<34}{'':<24}read by: {', '.join(readers()[name])}")
    return "\n".join(lines)


def nearest(name: str, known) -> str:
    """' Did you mean X?' for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _split(kind, argv: list[str]) -> tuple[Path | None, dict[str, str]]:
    path, overrides = None, {}
    for argument in argv:
        if argument.startswith("--local_rank="):  # the deepspeed launcher adds it; the LOCAL_RANK variable says the same
            continue
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals and name in kind.model_fields and kind.model_fields[name].annotation is bool:
                value = "True"
            elif not equals:
                raise ValueError(f"{argument} has no value; write --{name}=VALUE.{nearest(name, kind.model_fields)}")
            overrides[name] = value
        elif path is None:
            path = Path(argument)
        else:
            raise ValueError(f"expected one recipe file and --key=value options, saw {argument!r} after {str(path)!r}")
    return path, overrides


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in (REPOSITORY / "posttrain" / "recipes").glob("*.yaml")))
        raise FileNotFoundError(f"no recipe at {path}. Shipped in posttrain/recipes: {shipped}")
    try:
        values = yaml.load(path.read_text(), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold `key: value` lines, saw {type(values).__name__}")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"{_names(twice)} is set twice")
        return super().construct_mapping(node, deep)


def _refuse_unknown(kind, values: dict, where: str = "") -> None:
    unknown = [f"unknown key {name!r}.{nearest(str(name), kind.model_fields)}" for name in values if name not in kind.model_fields]
    if unknown:
        raise ValueError(where + "\n".join(unknown) + "\n--help lists every key")


def _explain(kind, problems: list[dict]) -> str:
    """A line for each key. One that may be of several kinds has a problem with each."""
    lines = []
    for name in dict.fromkeys(str(problem["loc"][0]) for problem in problems):
        mine, meaning = [problem for problem in problems if problem["loc"][0] == name], kind.model_fields[name].description
        messages = ", or: ".join(problem["msg"].removeprefix("Value error, ") for problem in mine)
        is_missing = mine[0]["type"] == "missing"
        lines.append(f"{name} is missing: {meaning}" if is_missing else f"{name}={mine[0]['input']!r}: {messages} ({meaning})")
    return "\n".join(lines)


def _given(values: dict) -> set[str]:
    return {name for name, value in values.items() if str(value).lower() not in ("none", "null")}


def _names(keys) -> str:
    return " and ".join(sorted(keys))
