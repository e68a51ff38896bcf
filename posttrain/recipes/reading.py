"""Reads recipes, YAML plus --key=value, and checks the name, type and use of every key."""

import sys
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError

from posttrain.common.errors import nearest
from posttrain.common.files import REPOSITORY
from posttrain.objectives.losses import LOSSES
from posttrain.recipes.keys import DPORecipe, Recipe, SFTRecipe

# Two ways to say the same. Both in one place (file or command line) are an error; the command line's way replaces the file's.
EXCLUSIVE = (
    ({"max_iters"}, {"epochs"}),
    ({"warmup_iters"}, {"warmup_ratio"}),
    ({"global_batch_size"}, {"batch_size", "gradient_accumulation_steps"}),
)


def load_recipe(kind: type[Recipe], default: str, argv: list[str]) -> Recipe:
    """Read the recipe of a command line, [RECIPE.yaml] [--key=value ...]; --help prints every key and exits.

    `default` is the stem of the recipe to read where none is named. Raises ValueError or FileNotFoundError for a mistake.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(kind, default))
        sys.exit(0)
    path, overrides = _split(kind, argv)
    path = path or REPOSITORY / "posttrain" / "recipes" / f"{default}.yaml"
    file = _read_yaml(path)
    _refuse_unknown(kind, file, f"{path}: ")
    return build_recipe(kind, file, overrides)


def load_recipe_of_either_kind(arguments: list[str]) -> Recipe:
    """Read the recipe of a command line, as DPO's if its file has the key dpo_data_dir, else as SFT's, which is also the default."""
    file = next((Path(word) for word in arguments if not word.startswith("--")), None)
    if file and "dpo_data_dir" in _read_yaml(file):
        return load_recipe(DPORecipe, "dpo_qwen3_1.8b", arguments)
    return load_recipe(SFTRecipe, "sft_qwen3_1.8b", arguments)


def build_recipe(kind: type[Recipe], file: dict, overrides: dict) -> Recipe:
    """Return the checked recipe of a file's values and the command line's, which win. Raises ValueError naming every wrong key."""
    for left, right in EXCLUSIVE:
        for place, values in (("the recipe", file), ("the command line", overrides)):
            if left & _given(values) and right & _given(values):
                raise ValueError(f"{place} sets both {_names(left & _given(values))} and {_names(right & _given(values))}; give one")
        for mine, other in ((left, right), (right, left)):
            if mine & _given(overrides):
                file = {name: value for name, value in file.items() if name not in other}
    values = {**file, **overrides}
    _refuse_unknown(kind, values)
    if not {"max_iters", "epochs"} & _given(values):
        values["epochs"] = kind.usual_epochs
    if "warmup_ratio" in _given(values):
        values["warmup_iters"] = None
    try:
        recipe = kind(**values)
    except ValidationError as error:
        raise ValueError(_explain(kind, error.errors())) from None
    _refuse_unread(recipe)
    return recipe


def _refuse_unread(recipe: Recipe) -> None:
    """Raise ValueError for an option that this run would not read, and for values that are missing or contradict each other."""
    fields = type(recipe).model_fields
    given = {name for name in recipe.model_fields_set if getattr(recipe, name) != fields[name].default}
    if recipe.global_batch_size is None and recipe.batch_size is None and recipe.gradient_accumulation_steps is None:
        raise ValueError("examples per step are missing: give global_batch_size, or batch_size and gradient_accumulation_steps")
    for name in (name for name in fields if name in given):
        for need in fields[name].json_schema_extra["needs"]:
            others = need.split("|")
            if not any(getattr(recipe, other) for other in others):
                off = " and ".join(f"{other}={getattr(recipe, other)}" for other in others)
                raise ValueError(f"{name} would not be read with {off}; remove it, or set {' or '.join(others)}")
    if recipe.min_lr > recipe.learning_rate:
        raise ValueError(f"min_lr {recipe.min_lr:g} is above learning_rate {recipe.learning_rate:g}")
    if recipe.lr_decay_iters and recipe.lr_decay_iters <= (recipe.warmup_iters or 0):
        raise ValueError(f"lr_decay_iters {recipe.lr_decay_iters} is not after warmup_iters {recipe.warmup_iters}: no step would decay")
    if 0 < recipe.skip_spikes <= 1:
        raise ValueError(f"skip_spikes={recipe.skip_spikes:g} would refuse every other step: give a factor well above 1, or 0 for off")
    if recipe.eval_only and recipe.replay_step:
        raise ValueError("eval_only and replay_step are two ways not to train; give one")
    if isinstance(recipe, DPORecipe):
        _refuse_unread_by_loss(recipe, given)


def readers() -> dict[str, list[str]]:
    """Return the options that not every loss reads, each with the names of the losses that do."""
    read = {name: [loss for loss in LOSSES if name in LOSSES[loss].reads] for name in ("label_smoothing", "simpo_gamma", "reference")}
    read["ld_alpha"] = [loss for loss in LOSSES if "lengths" not in LOSSES[loss].reads]
    read["chosen_nll_weight"] = [loss for loss in LOSSES if loss != "orpo"]  # which has that term already
    read["reference_free"] = [loss for loss in LOSSES if LOSSES[loss].is_of_the_margin]
    return read


def _refuse_unread_by_loss(recipe: DPORecipe, given: set[str]) -> None:
    """Raise ValueError for an option that DPO or the recipe's loss would not read; `given` are the keys that differ from their default."""
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
    """Return what --help prints: usage, and each key with its default, meaning and choices."""
    script = "sft" if kind is SFTRecipe else "dpo"
    lines = [
        f"deepspeed --num_gpus N posttrain/{script}.py [RECIPE.yaml] [--key=value ...]",
        f"python posttrain/{script}.py [RECIPE.yaml] [--key=value ...]        on one device",
        "",
        f"{(kind.__doc__ or '').strip()} Without RECIPE.yaml the recipe is posttrain/recipes/{default}.yaml.",
        "",
        "Each key with its value if the recipe does not set it, and its meaning:",
        "",
    ]
    for name, field in kind.model_fields.items():
        shown = "(required)" if field.is_required() else str(field.default)
        lines.append(f"  --{name + '=':<32}{shown:<24}{field.description}")
        if choices := [choice for choice in get_args(field.annotation) if isinstance(choice, str)]:
            lines.append(f"  {'':<34}{'':<24}one of: {', '.join(choices)}")
        if kind is DPORecipe and name in readers():
            lines.append(f"  {'':<34}{'':<24}only with loss: {', '.join(readers()[name])}")
    return "\n".join(lines)


def _split(kind, argv: list[str]) -> tuple[Path | None, dict[str, str]]:
    """Split a command line into the recipe's path, if there is one, and the values by key. Raises ValueError for other words."""
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
    """Return a YAML file's keys and values. Raises FileNotFoundError, or ValueError if it is no mapping or sets a key twice."""
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
    """Raises an error for a key that is set twice, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"{_names(twice)} is set twice")
        return super().construct_mapping(node, deep)


def _refuse_unknown(kind, values: dict, where: str = "") -> None:
    """Raise ValueError naming the keys that the recipe does not have; the message begins with `where`."""
    unknown = [f"unknown key {name!r}.{nearest(str(name), kind.model_fields)}" for name in values if name not in kind.model_fields]
    if unknown:
        raise ValueError(where + "\n".join(unknown) + "\n--help lists every key")


def _explain(kind, problems: list[dict]) -> str:
    """Turn pydantic's errors into a line for each key; one that may have several types has an error for each."""
    lines = []
    for name in dict.fromkeys(str(problem["loc"][0]) for problem in problems):
        mine, meaning = [problem for problem in problems if problem["loc"][0] == name], kind.model_fields[name].description
        messages = ", or: ".join(problem["msg"].removeprefix("Value error, ") for problem in mine)
        is_missing = mine[0]["type"] == "missing"
        lines.append(f"{name} is missing: {meaning}" if is_missing else f"{name}={mine[0]['input']!r}: {messages} ({meaning})")
    return "\n".join(lines)


def _given(values: dict) -> set[str]:
    """Return the keys whose value is not none."""
    return {name for name, value in values.items() if str(value).lower() not in ("none", "null")}


def _names(keys) -> str:
    return " and ".join(sorted(keys))
