"""Chooses for ds_config: auto and activation_checkpointing: auto the fastest way to run that fits into memory, on all ranks alike.

What was chosen is written into run.json, and a run that is resumed in the same setting keeps it, since another way rounds differently.
"""

import json
from pathlib import Path

import psutil
import torch

from posttrain.common.errors import first_line
from posttrain.common.places import find_ds_config
from posttrain.data.prepared import PreparedData
from posttrain.engine.ds_config import read_ds_config
from posttrain.parallel.launched import read_launch
from posttrain.parallel.ranks import gathered, on_rank_0, same_on_all_ranks
from posttrain.planning.activations import possible_ways
from posttrain.planning.machines import free_on_host
from posttrain.planning.planner import CHECKPOINTING, ZERO0, Planner, Way
from posttrain.recipes.keys import AUTO, Recipe
from posttrain.run.stored import is_run, read_facts, read_recipe
from posttrain.training import auto_batch
from posttrain.training.inputs import check_lengths

USUAL = Way("ds_configs/zero1.json", "none")  # where the model's memory cannot be estimated
CHOSEN = ("ds_config", "activation_checkpointing", "max_tokens_per_gpu")  # the recipe's keys that may be settled here


def is_asked(recipe: Recipe) -> bool:
    """Whether the recipe leaves a part of the layout to be chosen."""
    return AUTO in (recipe.ds_config, recipe.activation_checkpointing)


def settle(recipe: Recipe, data: PreparedData, device: torch.device) -> tuple[Recipe, list[tuple[str, str]]]:
    """Return the recipe with a ds_config and a way of checkpointing activations, and what is said of them on the first screen. All ranks.

    Where only smaller micro-batches fit, max_tokens_per_gpu is lowered. Raises ValueError where nothing fits, or where an example is longer
    than the recipe's max_tokens_per_gpu.
    """
    if not is_asked(recipe):
        return recipe, []
    if recipe.max_tokens_per_gpu != AUTO:
        check_lengths(data, recipe.max_tokens_per_gpu)
    held = psutil.Process().memory_info().rss if device.type == "cpu" else 0  # by libraries, which the planner does not count
    free, host = min(gathered(auto_batch.usable_bytes(device) - held)), min(gathered(free_on_host()))
    changes, said = on_rank_0(lambda: _of_run(recipe, device) or _chosen(recipe, free, host, data.longest))
    settled = recipe.model_copy(update=changes)
    same_on_all_ranks("ds_config", {f"content of {settled.ds_config}": _content(settled.ds_config)})  # it may be the run's own
    return settled, [("layout", said)]


def _content(ds_config: str) -> str:
    """Return what a ds_config holds on this host, or why it cannot be read."""
    try:
        return json.dumps(read_ds_config(ds_config), sort_keys=True)
    except (OSError, ValueError) as error:
        return str(error)


def record(asked: Recipe, settled: Recipe, device: torch.device) -> dict:
    """Return what run.json holds of a choice: the setting that it was made in, and what was chosen."""
    return {"as": _setting(asked, device), **{name: getattr(settled, name) for name in CHOSEN}}


def _setting(recipe: Recipe, device: torch.device) -> dict:
    """Return all that the choice depends on."""
    keys = {*auto_batch.MATTERS, *CHOSEN}
    machine = {"ranks_of_node": read_launch().local_size, **auto_batch.ranks_and_device(device)}
    return machine | {key: getattr(recipe, key, None) for key in sorted(keys)}


def _of_run(recipe: Recipe, device: torch.device) -> tuple[dict, str] | None:
    """Return what an existing run goes on with: what was chosen in this setting, or where it never chose what its last start had in it."""
    run = Path(recipe.out_dir)
    if not is_run(run):
        return None
    facts = read_facts(run)
    layout, before = facts.get("layout"), facts.get("layout") or read_recipe(run, *CHOSEN[:2])
    if layout and layout["as"] != _setting(recipe, device):
        return None
    here = {**auto_batch.ranks_and_device(device), "ds_config": Path(before["ds_config"]).stem}
    if not layout and not (facts.get("starts") and here.items() <= facts["starts"][-1].items()):
        return None
    changes = {name: before[name] for name in CHOSEN[:2] if getattr(recipe, name) == AUTO}
    if AUTO in changes.values() or not _is_there(changes.get("ds_config")):
        return None
    if layout:
        changes["max_tokens_per_gpu"] = layout["max_tokens_per_gpu"]
    return changes, f"{_named(recipe, changes)} (auto: as this run had it before)"


def _is_there(ds_config: str | None) -> bool:
    """Whether the file of a ds_config that a run had can be read; None, the recipe's own, was looked at before."""
    try:
        return ds_config is None or bool(find_ds_config(ds_config))
    except FileNotFoundError:
        return False


def _named(recipe: Recipe, changes: dict) -> str:
    """Return a layout as text."""
    ds_config, checkpointing, _ = (changes.get(name, getattr(recipe, name)) for name in CHOSEN)
    return f"{ds_config}, activation_checkpointing {checkpointing}"


def _chosen(recipe: Recipe, free: float, host: float, longest: int) -> tuple[dict, str]:
    """Return the keys to set for the fastest way that fits into `free` bytes a rank and `host` bytes a node, and why.

    `longest` is the tokens of the longest example, of training or validation. Raises ValueError where none fits.
    """
    try:
        planner = auto_batch.planner_here(recipe, free)
        planner.host, planner.longest = host, longest
        if recipe.max_tokens_per_gpu == AUTO:  # to begin with
            usual = type(recipe).model_fields["max_tokens_per_gpu"].default
            planner.tokens = max(planner.longest, min(planner.tokens, usual))
        ways = _ways(planner, recipe)
        best = planner.best(ways)
    except (ValueError, OSError) as error:
        # of a kind of model that cannot be estimated; if it cannot be trained either, loading says so next
        usual = USUAL._replace(checkpointing="full") if _checkpoints_itself(recipe.ds_config) else USUAL
        changes = {name: value for name, value in zip(CHOSEN, usual, strict=False) if getattr(recipe, name) == AUTO}
        why = first_line(error).partition(", so neither")[0]
        return changes, f"{_named(recipe, changes)} (auto: the usual one, since memory cannot be estimated: {why})"
    if best is None:
        raise ValueError(_nothing_fits(planner, recipe, ways))
    changes = {name: value for name, value in zip(CHOSEN, best, strict=False) if getattr(recipe, name) == AUTO}
    tokens, lowered = planner.tokens, ""
    if not planner.holds(best, tokens):
        tokens = planner.most_tokens(best)
        if recipe.max_tokens_per_gpu != AUTO:
            changes["max_tokens_per_gpu"], lowered = tokens, f" and micro-batches of at most {tokens:,} tokens"
    taken = f"{planner.parts(best, tokens).total / 1e9:.1f} of {free / 1e9:.1f} GB"
    return changes, f"{_named(recipe, changes)} (auto: the fastest that fits, by estimate with {taken}{lowered}){_before(recipe)}"


def _ways(planner: Planner, recipe: Recipe) -> list[Way]:
    """Return the ways to run that the recipe leaves open. Raises ValueError where there are none."""
    ways = [way for way in planner.ways() if way.ds_config != ZERO0]
    if recipe.ds_config != AUTO:
        ways = [Way(recipe.ds_config, mode) for mode in possible_ways(planner.counted, CHECKPOINTING)]
    elif recipe.activation_checkpointing != AUTO:
        ways = [Way(ds_config, recipe.activation_checkpointing) for ds_config in dict.fromkeys(way.ds_config for way in ways)]
    ways = [way for way in ways if way.checkpointing == "full" or not _checkpoints_itself(way.ds_config)]
    if not ways:
        raise ValueError(f"{recipe.ds_config} recomputes whole layers, which this model cannot")
    return ways


def _checkpoints_itself(ds_config: str) -> bool:
    """Whether a ds_config has a section about activation checkpointing, which applies to whole layers only."""
    return ds_config != AUTO and "activation_checkpointing" in read_ds_config(ds_config)


def _nothing_fits(planner: Planner, recipe: Recipe, ways: list[Way]) -> str:
    """Return the error for a model that fits in none of `ways`."""
    least = min(ways, key=lambda way: planner.parts(way, planner.longest).total)
    needed, which = planner.parts(least, planner.longest).total, _named(recipe, dict(zip(CHOSEN, least, strict=False)))
    asked = " and ".join(f"{name}: auto" for name in CHOSEN[:2] if getattr(recipe, name) == AUTO)
    number = f" --max_tokens_per_gpu={planner.longest}" if recipe.max_tokens_per_gpu == AUTO else ""
    return (
        f"{asked}: {recipe.model_path} does not fit on {planner.ranks} x {planner.device.name}. What takes the least, {which}, is "
        f"estimated to take {needed / 1e9:.1f} GB of {planner.usable / 1e9:.1f} for the longest example, {planner.longest:,} tokens: "
        f"{planner.smallest_change(ways)}. To try it all the same, name both: --ds_config={least.ds_config} "
        f"--activation_checkpointing={least.checkpointing}{number}"
    )


def _before(recipe: Recipe) -> str:
    """Return what to say where an existing run had another layout until now."""
    run = Path(recipe.out_dir)
    starts = read_facts(run).get("starts") if is_run(run) else None
    return f"; until now this run had {starts[-1]['ds_config']}.json on {starts[-1]['ranks']} ranks" if starts else ""
