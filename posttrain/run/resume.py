"""Decides whether a run that is already there may continue with a recipe, and whether it is finished."""

import os
from pathlib import Path

from posttrain.common import terminal
from posttrain.common.links import refuse_links
from posttrain.data.batches import PLAN_VERSION
from posttrain.recipes.keys import ANY_TIME, BY_EXTEND, SAME_CONTENT, Recipe
from posttrain.run.stored import LOGS as RECORDS
from posttrain.run.stored import is_run, read_facts, read_recipe

LOGS = "logs"
FOLDERS = (LOGS, "checkpoints", "model", "final", "benchmarks")  # that a run makes in its directory
FILES = (".lock", *RECORDS)  # that it appends to
CREATING = ".creating"  # this file exists while a run is created: after a crash there is no run yet, and the same command starts it again
LENGTH_KEYS = Recipe.keys_that_change(BY_EXTEND)


def resolve(recipe: Recipe, world_size: int) -> Recipe:
    """Returns the recipe with global_batch_size resolved, checked against the run that out_dir may already hold. Writes nothing.

    Raises ValueError if out_dir holds something else than a run, or a run with which the recipe cannot continue.
    """
    form = {"batch_size": recipe.batch_size, "gradient_accumulation_steps": recipe.gradient_accumulation_steps}
    batch = recipe.global_batch_size or (recipe.batch_size or 1) * (recipe.gradient_accumulation_steps or 1) * world_size
    out_dir = Path(recipe.out_dir)
    _refuse_other_things(out_dir)
    if is_run(out_dir):
        stored = read_facts(out_dir, "kind", "plan_version", "batch_form", "total_steps")
        if stored["kind"] != recipe.kind:
            raise ValueError(f"{out_dir} holds a {stored['kind']} run; give another --out_dir")
        if stored["plan_version"] != PLAN_VERSION:
            raise ValueError(
                f"{out_dir} was made with plan version {stored['plan_version']}, this is {PLAN_VERSION}; finish it with that code"
            )
        # a key that did not exist when the run began had its default then
        was = {name: field.default for name, field in type(recipe).model_fields.items() if not field.is_required()}
        was |= read_recipe(out_dir, *(name for name, field in type(recipe).model_fields.items() if field.is_required()))
        if recipe.global_batch_size is None and stored["batch_form"] == form:
            batch = was["global_batch_size"]  # fixed when the run was created, whatever the number of GPUs is now
        recipe = _keep_schedule(recipe.model_copy(update={"global_batch_size": batch}), was, stored)
        free = recipe.keys_that_change(ANY_TIME) | recipe.keys_that_change(SAME_CONTENT)  # what lies at a path is compared later
        changed = {name for name, value in recipe.model_dump().items() if name not in free and was.get(name) != value}
        if recipe.extend:
            changed -= LENGTH_KEYS
        if changed:
            lines = [f"    {name}: {was.get(name)!r} -> {getattr(recipe, name)!r}" for name in recipe.model_dump() if name in changed]
            raise ValueError(
                f"{out_dir} holds a run of another recipe; a run continues only with its own:\n" + "\n".join(lines) + "\n"
                "Undo these changes, or start a new run with another --out_dir"
                + (". To continue beyond the run's end, add --extend" if changed <= LENGTH_KEYS else "")
            )
    elif recipe.extend:
        raise ValueError(f"--extend makes a run longer, and {out_dir} is not a run: leave --extend out, or name the run's --out_dir")
    elif out_dir.exists() and not (out_dir / CREATING).exists() and not all(map(_is_ignorable, out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists, is not empty and is not a run; give another --out_dir")
    return recipe.model_copy(update={"global_batch_size": batch})


def _refuse_other_things(out_dir: Path) -> None:
    """Raise ValueError where out_dir, or what lies in it, is of a kind that a run cannot write to, before anything is loaded."""
    if os.path.lexists(out_dir) and not out_dir.is_dir():
        what = "a link that leads nowhere" if not out_dir.exists() else "not a folder"
        raise ValueError(f"out_dir {out_dir} is {what}: give another --out_dir, or remove it")
    if not out_dir.is_dir():
        return
    refuse_links(out_dir)
    for name in FOLDERS:
        if os.path.lexists(out_dir / name) and not (out_dir / name).is_dir():
            raise ValueError(f"{out_dir / name} is not a folder, which a run keeps there: move it away, or give another --out_dir")
    logs = out_dir / LOGS
    files = [out_dir / f"{name}{ending}" for name in FILES for ending in ("", ".damaged")]
    for path in (*files, *(logs.iterdir() if logs.is_dir() else ())):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file that can be written: it is a folder, a pipe or a device. Move it away")


def _is_ignorable(path: Path) -> bool:
    """Whether a file may be in a folder that becomes a run: a hidden file, or the logs of a start that failed."""
    return path.name.startswith(".") or path.name == LOGS


def _keep_schedule(recipe: Recipe, was: dict, stored: dict) -> Recipe:
    """Returns the recipe with lr_decay_iters such that an extended run keeps its learning rates up to the old end.

    Raises ValueError if the rate would be 0 after it.
    """
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
    """Whether final/, which is written last, is there, and of a run as long as the recipe's. If so, prints it on rank 0."""
    final = Path(recipe.out_dir) / "final"
    if recipe.only_looks or not final.is_dir():
        return False
    if read_facts(Path(recipe.out_dir)).get("finished") != length_of(recipe):
        return False
    if rank == 0:
        terminal.say(f"{recipe.out_dir} is finished: {final}. Start another run with another --out_dir")
    return True


def extension_of(recipe: Recipe) -> dict[str, list]:
    """Returns what --extend changes in the existing run: key -> [old value, new value]."""
    was = read_recipe(Path(recipe.out_dir))
    return {name: [was.get(name), getattr(recipe, name)] for name in sorted(LENGTH_KEYS) if was.get(name) != getattr(recipe, name)}


def moved_paths(recipe: Recipe) -> dict[str, tuple[str | None, str | None]]:
    """Returns the paths to model, data and tokenizer that the existing run was given otherwise: key -> (then, now)."""
    was = read_recipe(Path(recipe.out_dir))
    both = {name: (was.get(name), getattr(recipe, name)) for name in sorted(recipe.keys_that_change(SAME_CONTENT))}
    return {name: (then, now) for name, (then, now) in both.items() if then != now}


def length_of(recipe: Recipe) -> dict:
    """Returns the keys that set a run's length, with their values."""
    return {name: getattr(recipe, name) for name in sorted(LENGTH_KEYS)}
