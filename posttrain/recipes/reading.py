"""Reads recipes, YAML plus --key=value, and checks the name, type and use of every key."""

import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from posttrain.common.errors import nearest, shown
from posttrain.common.files import LARGEST_YAML, UniqueKeys, read_whole
from posttrain.common.hub import is_hub_name
from posttrain.common.places import command, expanded, in_this_form
from posttrain.objectives.losses import LOSSES
from posttrain.parallel.script import is_rank_0
from posttrain.recipes.keys import DPORecipe, Recipe, SFTRecipe, nature
from posttrain.recipes.other_names import OTHER_NAMES

RECIPES = Path(__file__).parent
MOST_NAMED = 5  # keys that are wrong, in one message
KINDS = {"sft": (SFTRecipe, "sft_qwen3_1.8b"), "dpo": (DPORecipe, "dpo_qwen3_1.8b")}
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
        if is_rank_0():
            print(help_text(kind, default))
        sys.exit(0)
    path, overrides = _split(kind, argv)
    path = path or RECIPES / f"{default}.yaml"
    file = _read_yaml(path)
    _refuse_other_kind(kind, file, path)
    _refuse_unknown(kind, file, f"{path}: ")
    recipe, idle = _build(kind, file, overrides, f"{path}: ")
    for one in idle if is_rank_0() else ():
        print(f"note: {one.name} of {path} is not read with {one.off}", flush=True)
    return recipe


def load_recipe_of(kind: str, arguments: list[str]) -> Recipe:
    """Read the recipe of a command line of sft.py or dpo.py; `kind` is sft or dpo."""
    return load_recipe(*KINDS[kind], arguments)


def load_recipe_of_either_kind(arguments: list[str]) -> Recipe:
    """Read the recipe of a command line, as DPO's if its file has the key dpo_data_dir, else as SFT's, which is also the default."""
    words = list(_words(arguments))
    place = next((value for name, value in words if name is None), None)
    is_dpo = "dpo_data_dir" in _read_yaml(Path(expanded(place))) if place else any(name == "dpo_data_dir" for name, _ in words)
    return load_recipe_of("dpo" if is_dpo else "sft", arguments)


# the keys of the same meaning in the other kind of recipe
TWINS = {"checkpoint_path": "sft_checkpoint_path", "sft_data_dir": "dpo_data_dir"}
TWINS |= {other: name for name, other in TWINS.items()}


class Idle(NamedTuple):
    """A key that was given a value which the run would not read."""

    name: str
    off: str  # what switches it off, e.g. samples=0
    causes: set[str]  # the keys that do
    mistake: str  # what to say, and what to do


def build_recipe(kind: type[Recipe], file: dict, overrides: dict) -> Recipe:
    """Return the checked recipe of a file's values and the command line's, which win. Raises ValueError naming every wrong key."""
    return _build(kind, file, overrides)[0]


def _build(kind: type[Recipe], file: dict, overrides: dict, where: str = "") -> tuple[Recipe, list[Idle]]:
    """Return the checked recipe, and which keys of the file have their default in it, since the command line made them idle.

    `where` begins what is said of a value of the file's.
    """
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
    elif "warmup_iters" not in _given(values):
        values["warmup_iters"] = 0
    try:
        recipe = kind(**values)
    except ValidationError as error:
        raise ValueError(_explain(kind, error.errors(), {name: where for name in file if name not in overrides})) from None
    idle = [one for one in _idle(recipe) if one.name not in overrides and one.causes & overrides.keys()]
    if idle:
        recipe = kind(**{name: value for name, value in values.items() if name not in {one.name for one in idle}})
    _refuse_unread(recipe)
    return recipe, idle


def _idle(recipe: Recipe) -> Iterator[Idle]:
    """Yield the keys that have another value than their default, which this run would not read."""
    fields = type(recipe).model_fields
    given = [name for name in fields if name in recipe.model_fields_set and getattr(recipe, name) != fields[name].default]
    for name in given:
        for need in nature(fields[name])["needs"]:
            others = need.split("|")
            if not any(getattr(recipe, other) for other in others):
                off = " and ".join(f"{other}={getattr(recipe, other)}" for other in others)
                yield Idle(name, off, set(others), f"{name} would not be read with {off}; remove it, or set {' or '.join(others)}")
    if not isinstance(recipe, DPORecipe):
        return
    for name, losses in readers().items():
        if name in given and recipe.loss not in losses:
            mistake = f"loss {recipe.loss} does not read {name}; remove it. It is read by {', '.join(losses)}"
            yield Idle(name, f"loss={recipe.loss}", {"loss"}, mistake)
    if recipe.reference_free and "reference" in given:
        mistake = f"reference_free has no reference, so reference={recipe.reference} would not be read; remove one"
        yield Idle("reference", "reference_free=True", {"reference_free"}, mistake)


def _refuse_unread(recipe: Recipe) -> None:
    """Raise ValueError for an option that this run would not read, and for values that are missing or contradict each other."""
    if recipe.global_batch_size is None and recipe.batch_size is None and recipe.gradient_accumulation_steps is None:
        raise ValueError("examples per step are missing: give global_batch_size, or batch_size and gradient_accumulation_steps")
    for idle in _idle(recipe):
        raise ValueError(idle.mistake)
    if recipe.min_lr > recipe.learning_rate:
        raise ValueError(f"min_lr {recipe.min_lr:g} is above learning_rate {recipe.learning_rate:g}")
    refuse_decay_in_warmup(recipe)
    if 0 < recipe.skip_spikes <= 1:
        raise ValueError(f"skip_spikes={recipe.skip_spikes:g} would refuse every other step: give a factor well above 1, or 0 for off")
    if recipe.eval_only and recipe.replay_step:
        raise ValueError("eval_only and replay_step are two ways not to train; give one")
    if isinstance(recipe, DPORecipe) and recipe.dropout:
        raise ValueError("dropout must be 0 in DPO: policy and reference would differ before the first step")
    if isinstance(recipe, DPORecipe) and LOSSES[recipe.loss].needs_smoothing and not recipe.label_smoothing:
        example = "1e-3" if recipe.loss == "exo_pair" else "0.1"
        raise ValueError(f"loss {recipe.loss} needs a label_smoothing above 0, for example {example}")


def refuse_decay_in_warmup(recipe: Recipe) -> None:
    """Raise ValueError where the cosine would end before it begins; a warmup_ratio is looked at once its steps are known."""
    if recipe.lr_decay_iters and recipe.lr_decay_iters <= (recipe.warmup_iters or 0):
        raise ValueError(f"lr_decay_iters {recipe.lr_decay_iters} is not after warmup_iters {recipe.warmup_iters}: no step would decay")


def readers() -> dict[str, list[str]]:
    """Return the options that not every loss reads, each with the names of the losses that do."""
    read = {name: [loss for loss in LOSSES if name in LOSSES[loss].reads] for name in ("label_smoothing", "simpo_gamma", "reference")}
    read["ld_alpha"] = [loss for loss in LOSSES if "lengths" not in LOSSES[loss].reads]
    read["chosen_nll_weight"] = [loss for loss in LOSSES if loss != "orpo"]  # which has that term already
    read["reference_free"] = [loss for loss in LOSSES if LOSSES[loss].is_of_the_margin]
    return read


def help_text(kind: type[Recipe], default: str) -> str:
    """Return what --help prints: usage, and each key with its default, meaning and choices."""
    lines = [
        f"{command(kind.kind, ranks=8)} [RECIPE.yaml] [--key=value ...]        on 8 GPUs",
        f"{command(kind.kind)} [RECIPE.yaml] [--key=value ...]        on one device",
        "",
        f"{(kind.__doc__ or '').strip()} Without RECIPE.yaml the recipe is {RECIPES / default}.yaml.",
        "",
        "Each key with its value in that recipe (or, where it does not name the key, without one), and its meaning:",
        "",
    ]
    own = _read_yaml(RECIPES / f"{default}.yaml")
    for name, field in kind.model_fields.items():
        shown = str(own[name] if name in own else "(required)" if field.is_required() else field.default)
        lines.append(f"  --{name + '=':<32}{shown:<24}{field.description}")
        if choices := [choice for choice in get_args(field.annotation) if isinstance(choice, str)]:
            lines.append(f"  {'':<34}{'':<24}one of: {', '.join(choices)}")
        if kind is DPORecipe and name in readers():
            lines.append(f"  {'':<34}{'':<24}only with loss: {', '.join(readers()[name])}")
    return in_this_form("\n".join(lines))


def _split(kind: type[Recipe], argv: list[str]) -> tuple[Path | None, dict[str, str]]:
    """Split a command line into the recipe's path, if there is one, and the values by key. Raises ValueError for other words.

    A value follows its key after `=` or as the next word; a key that is true or false may stand alone.
    """
    path, overrides = None, {}
    for name, value in _words(argv):
        if name is None and path is not None:
            raise ValueError(f"expected one recipe file and --key=value options, saw {value!r} after {str(path)!r}")
        if name is None:
            path = Path(expanded(str(value)))
        else:
            overrides[name] = value
    _refuse_unknown(kind, overrides)
    for name, value in overrides.items():
        if value is None:
            raise ValueError(f"--{name} has no value; write --{name}=VALUE")
    return path, overrides


def _words(argv: list[str]) -> Iterator[tuple[str | None, str | None]]:
    """Yield (key, value) for each option of a command line, the value being None where it lacks one, and (None, word) for other words."""
    words = deque(argv)
    while words:
        word = words.popleft()
        if word.startswith("--local_rank="):  # the deepspeed launcher adds it; the LOCAL_RANK variable says the same
            continue
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--"):
            yield None, word
        elif equals:
            yield name, value
        elif any(name in kind.model_fields and kind.model_fields[name].annotation is bool for kind, _ in KINDS.values()):
            stands = words and words[0].lower() in ("true", "false")
            yield name, words.popleft() if stands else "True"
        else:
            yield name, words.popleft() if words and not words[0].startswith("--") else None


def _read_yaml(path: Path) -> dict:
    """Return a YAML file's keys and values. Raises FileNotFoundError, or ValueError if it is no mapping or sets a key twice."""
    if not path.is_file():
        if path.is_dir() or path.suffix in (".pt", ".pth") or is_hub_name(str(path)):
            raise ValueError(f"{path} is not a recipe, a YAML file. Give a model as --checkpoint_path={path} (DPO: sft_checkpoint_path)")
        names = ", ".join(sorted(one.name for one in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"no recipe at {path}. Shipped in {RECIPES}: {names}")
    if path.name.removesuffix(".gz").endswith((".jsonl", ".csv", ".parquet")):
        raise ValueError(f"{path} holds rows, and no recipe: prepare them, and name the folder as --sft_data_dir (DPO: --dpo_data_dir)")
    text = read_whole(path, LARGEST_YAML)
    try:
        values = yaml.load(text, Loader=UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {str(error)[:1000]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold `key: value` lines, saw {type(values).__name__}")
    return values


def _refuse_other_kind(kind: type[Recipe], file: dict, path: Path) -> None:
    """Raise ValueError for a file that is a recipe of DPO where one of SFT is expected, or the other way round."""
    other = DPORecipe if kind is SFTRecipe else SFTRecipe
    required = {name for name, field in other.model_fields.items() if field.is_required()} - kind.model_fields.keys()
    if required & file.keys():
        raise ValueError(f"{path} is a recipe of {other.kind.upper()}, not of {kind.kind.upper()}: {command(other.kind, path)}")


def _refuse_unknown(kind: type[Recipe], values: dict, where: str = "") -> None:
    """Raise ValueError naming the keys that the recipe does not have; the message begins with `where`."""
    other = DPORecipe if kind is SFTRecipe else SFTRecipe
    unknown = []
    for name in map(str, values):
        if name in kind.model_fields:
            continue
        hint = nearest(name, kind.model_fields)
        if name in other.model_fields:
            hint = f" It is a key of {other.kind.upper()}." + (f" Here it is {TWINS[name]}." if name in TWINS else "")
        elif name in OTHER_NAMES:
            told = OTHER_NAMES[name]
            hint = f" That is {told}." if told.startswith(("missing", "not ")) else f" Here it is {told}."
        unknown.append(f"unknown key {shown(name)}.{hint}")
    if unknown:
        raise ValueError(where + _first(unknown) + "\n--help lists every key")


def _explain(kind: type[Recipe], problems: list[ErrorDetails], where: dict[str, str]) -> str:
    """Turn pydantic's errors into a line for each key, of which one that may have several types has an error for each.

    `where`: how the line of a key begins.
    """
    lines = []
    for name in dict.fromkeys(str(problem["loc"][0]) for problem in problems):
        mine, meaning = [problem for problem in problems if problem["loc"][0] == name], kind.model_fields[name].description
        messages = ", or: ".join(problem["msg"].removeprefix("Value error, ") for problem in mine)
        is_missing = mine[0]["type"] == "missing"
        said = f"{name} is missing: {meaning}" if is_missing else f"{name}={shown(mine[0]['input'])}: {messages} ({meaning})"
        lines.append(where.get(name, "") + said)
    return _first(lines)


def _first(lines: list[str]) -> str:
    """Return the first lines of a message, and how many others there are."""
    others = len(lines) - MOST_NAMED
    return "\n".join(lines[:MOST_NAMED] + ([f"and {others} others"] if others > 0 else []))


def _given(values: dict) -> set[str]:
    """Return the keys whose value is not none."""
    return {name for name, value in values.items() if str(value).lower() not in ("none", "null")}


def _names(keys) -> str:
    return " and ".join(sorted(keys))
