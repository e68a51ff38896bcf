"""Looks for what a recipe names and is not there, before torch is imported: a mistake is answered at once."""

import importlib.util
import os
import tempfile
from pathlib import Path

from posttrain.common import places
from posttrain.data.manifest import is_raw, read_manifest
from posttrain.model.forms import find_model, source_of, template_of_run, tokenizer_beside
from posttrain.parallel.script import is_rank_0
from posttrain.recipes.keys import AUTO, Recipe
from posttrain.run.wandb_mode import settle_mode

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # folders of compiled code: torch fails on one that it cannot make, once imported


def refuse_missing(recipe: Recipe) -> None:
    """Raise FileNotFoundError or ValueError, with what to do, where the ds_config, the prepared data or the model is not there.

    Also where out_dir, or a folder of the environment's for compiled code, cannot be written.
    """
    shipped = sorted(f"ds_configs/{one.name}" for one in places.shipped("ds_configs").glob("*.json"))
    for name in shipped if recipe.ds_config == AUTO else [recipe.ds_config]:
        found, ours = places.find_ds_config(name), places.shipped(name)
        if ours.is_file() and not ours.samefile(found) and is_rank_0():
            print(f"note: {name} is {found.resolve()}, not the file of this name that comes with posttrain", flush=True)
    find_model(source_of(recipe.model_path, recipe.out_dir), recipe.how_to_make_model)
    read_manifest(recipe.data_dir, prepare_command(recipe), recipe.kind)
    for name in CACHES:
        if folder := os.environ.get(name):
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                _try_to_write(folder)
            except OSError as error:
                raise ValueError(f"{name}={folder} cannot be written: {error.strerror}. Name another folder, or unset {name}") from None
    if not recipe.only_looks and is_rank_0():
        there = next(one for one in (Path(recipe.out_dir), *Path(recipe.out_dir).absolute().parents) if one.exists())
        try:
            _try_to_write(there)
        except OSError as error:
            raise ValueError(f"out_dir {recipe.out_dir} cannot be written ({there}: {error.strerror}): name another --out_dir") from None
    if recipe.wandb_log and not importlib.util.find_spec("wandb"):
        raise ValueError(
            "wandb_log=True needs the wandb package: export POSTTRAIN_EXTRAS=wandb and source launch/env.sh, or pip install wandb"
        )
    if recipe.wandb_log and not recipe.only_looks and is_rank_0():
        settle_mode(Path(recipe.out_dir))


def _try_to_write(folder: Path | str) -> None:
    """Raise OSError where no file can be made in `folder`."""
    tempfile.TemporaryFile(dir=folder).close()


def prepare_command(recipe: Recipe) -> str:
    """Return the command that prepares the recipe's data with its model's tokenizer, for error messages.

    Where the recipe names rows that are not prepared, these are what it prepares; and into another folder where one is in the way.
    """
    rows, folder = recipe.example_data, recipe.data_dir
    if is_raw(Path(folder)):
        rows, folder = folder, f"data/{Path(folder).name.partition('.')[0]}"
    if Path(folder).exists():
        folder = f"{folder.rstrip('/')}_{recipe.kind}"
    tokenizer = recipe.tokenizer or tokenizer_beside(recipe.model_path) or recipe.model_path
    template = template_of_run(recipe.model_path)
    form = [] if template in (None, "chatml") else ["--template", template]
    return places.command(f"prepare-{recipe.kind}", "--dataset", rows, "--tokenizer", tokenizer, *form, "--output_dir", folder)
