"""Whether a run that is already there may go on with a recipe, and as what."""

import json
from pathlib import Path

import yaml

from posttrain.common import terminal
from posttrain.data.batches import PLAN_VERSION
from posttrain.recipes.keys import ANY_TIME, BY_EXTEND, Recipe

LOGS = "logs"
CREATING = ".creating"  # there while a run is created: a crash then leaves no run, and the same command begins anew
LENGTH_KEYS = Recipe.keys_that_change(BY_EXTEND)


def resolve(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with global_batch_size settled, checked against the run that out_dir may already hold. Writes nothing."""
    form = {"batch_size": recipe.batch_size, "gradient_accumulation_steps": recipe.gradient_accumulation_steps}
    batch = recipe.global_batch_size or (recipe.batch_size or 1) * (recipe.gradient_accumulation_steps or 1) * world_size
    out_dir = Path(recipe.out_dir)
    if (out_dir / "run.json").is_file():
        stored = json.loads((out_dir / "run.json").read_text())
        if stored["kind"] != recipe.kind:
            raise ValueError(f"{out_dir} holds a {stored['kind']} run; give another --out_dir")
        if stored["plan_version"] != PLAN_VERSION:
            raise ValueError(
                f"{out_dir} was made with plan version {stored['plan_version']}, this is {PLAN_VERSION}; finish it with that code"
            )
        # a key that is newer than the run had its default then
        was = {name: field.default for name, field in type(recipe).model_fields.items() if not field.is_required()}
        was |= yaml.safe_load((out_dir / "recipe.yaml").read_text())
        if recipe.global_batch_size is None and stored["batch_form"] == form:
            batch = was["global_batch_size"]  # set once, when the run was created, whatever the number of GPUs is now
        recipe = _keep_schedule(recipe.model_copy(update={"global_batch_size": batch}), was, stored)
        free = recipe.keys_that_change(ANY_TIME)
        changed = {name for name, value in recipe.model_dump().items() if name not in free and was.get(name) != value}
        if recipe.extend:
            changed -= LENGTH_KEYS
        if changed:
            lines = [f"    {name}: {was.get(name)!r} -> {getattr(recipe, name)!r}" for name in recipe.model_dump() if name in changed]
            raise ValueError(
                f"{out_dir} holds a run of another recipe, which goes on only as it began:\n" + "\n".join(lines) + "\n"
                "Undo these changes, or start a new run with another --out_dir"
                + (". To go on beyond the run's end, add --extend" if changed <= LENGTH_KEYS else "")
            )
    elif recipe.extend:
        raise ValueError(f"--extend makes a run longer, and {out_dir} is not a run: leave --extend out, or name the run's --out_dir")
    elif out_dir.exists() and not (out_dir / CREATING).exists() and not all(map(_is_no_work, out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists, is not empty and is not a run; give another --out_dir")
    return recipe.model_copy(update={"global_batch_size": batch})


def _is_no_work(path: Path) -> bool:
    """Whether it may lie in a folder that becomes a run: hidden files, and logs of a start that failed."""
    return path.name.startswith(".") or path.name == LOGS


def _keep_schedule(recipe: Recipe, was: dict, stored: dict) -> Recipe:
    """A run that is extended keeps its learning rates up to the old end; the steps after it need some, too."""
    if stored.get("extended") and recipe.lr_decay_iters is None:
        recipe = recipe.model_copy(update={"lr_decay_iters": was["lr_decay_iters"]})
    if not recipe.extend or not recipe.decay_lr or all(getattr(recipe, name) == was[name] for name in LENGTH_KEYS):
        return recipe
    if recipe.lr_decay_iters in (None, was["lr_decay_iters"]):
        end = was["lr_decay_iters"] or stored["total_steps"]
        if not recipe.min_lr:
            raise ValueError(
                f"the learning rate of {recipe.out_dir} is 0 after step {end}: give --lr_decay_iters=N with --extend, the step at which "
                "the cosine now reaches min_lr"
            )
        return recipe.model_copy(update={"lr_decay_iters": end})
    return recipe


def already_finished(recipe: Recipe, rank: int) -> bool:
    """Whether final/ is there, which is written last and whole, for as many steps as the recipe says. Says so on rank 0."""
    final = Path(recipe.out_dir) / "final"
    if recipe.only_looks or not final.is_dir():
        return False
    if json.loads((Path(recipe.out_dir) / "run.json").read_text()).get("finished") != length_of(recipe):
        return False
    if rank == 0:
        terminal.say(f"{recipe.out_dir} is finished: {final}. Start another run with another --out_dir")
    return True


def extension_of(recipe: Recipe) -> dict[str, list]:
    """What --extend changes in the run that is there: old and new value by name."""
    was = yaml.safe_load((Path(recipe.out_dir) / "recipe.yaml").read_text())
    return {name: [was.get(name), getattr(recipe, name)] for name in sorted(LENGTH_KEYS) if was.get(name) != getattr(recipe, name)}


def length_of(recipe: Recipe) -> dict:
    return {name: getattr(recipe, name) for name in sorted(LENGTH_KEYS)}
