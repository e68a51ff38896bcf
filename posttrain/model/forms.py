"""Which of the accepted forms of a model lies at a path, and what lies beside it. Imports no torch: a command asks before it loads."""

import os
from pathlib import Path

from posttrain.common import hub
from posttrain.common.errors import nearest_path
from posttrain.common.files import WEIGHTS, read_object
from posttrain.common.links import refuse_links
from posttrain.engine import checkpoint_folder
from posttrain.model import folder
from posttrain.run.stored import is_run, model_problem, read_facts, read_recipe

HOW = "Name a Hugging Face folder, a run directory, a folder of a run's checkpoints, or a ckpt.pt file"


def is_ckpt_pt(path) -> bool:
    """Return whether the name is that of a ckpt.pt file (.pt or .pth), there or not, and not a folder's."""
    return str(path).endswith((".pt", ".pth")) and not os.path.isdir(path)


def find_model(path: str, how_to_make: str, weights: bool = True) -> None:
    """Raise FileNotFoundError, which ends with `how_to_make`, unless there is a model at `path`, ValueError if it cannot be trained.

    Of a Hugging Face folder it reads config.json and, with `weights`, the headers of the files with weights.
    """
    place, seen = Path(hub.snapshot_in(path)), "nothing"
    if checkpoint_folder.is_checkpoint(place) and is_run(run := checkpoint_folder.model_description(place).parent):
        refuse_links(run)
    elif place.is_dir():
        refuse_links(place, WEIGHTS)
    if is_ckpt_pt(path):
        found = place.is_file()
        hub.refuse_pointers(place.parent, [place.name])
    elif place.is_file():
        folder.refuse_file(path)
    elif checkpoint_folder.is_checkpoint(place):
        found, seen = (
            (checkpoint_folder.model_description(place) / "config.json").is_file(),
            "a checkpoint outside its run, whose model/ describes it",
        )
    elif is_run(place):
        if (place / "final").is_dir():
            raise FileNotFoundError(f"{path} is a run; name its result, {place / 'final'}, or one of its checkpoints, checkpoints/step_*")
        found, seen = False, "a run without a result yet; its checkpoints, checkpoints/step_*, are taken, too"
    elif saved := checkpoint_folder.saved_checkpoints(place):
        raise FileNotFoundError(f"{path} holds checkpoints of a run; name one of them, of which {saved[-1]} is the newest")
    elif place.is_dir():
        if found := (place / "config.json").is_file():
            folder.examine(place, weights)
        else:
            seen = folder.refuse_other_forms(place)
    elif found := hub.is_hub_name(path):
        from huggingface_hub import try_to_load_from_cache

        found = hub.is_reachable() or isinstance(try_to_load_from_cache(path, "config.json"), str)
        seen = "no such folder; as a hub name it is not in the local cache, and the hub cannot be reached"
    if not found:
        hint = "" if place.exists() else nearest_path(path)
        raise FileNotFoundError(f"there is no model at {path} (found {seen}).{hint} {how_to_make}")


def source_of(model_path: str, out_dir: str) -> str:
    """Return where to load the model of a training run from: `model_path`, or where nothing is there the run's newest whole checkpoint.

    A checkpoint holds all that it takes to go on: the weights, and beside it RUN/model describes them. Raises ValueError where that is
    damaged, too.
    """
    saved = _instead(model_path, out_dir)
    if not saved:
        return model_path
    if problem := model_problem(Path(out_dir)):
        raise ValueError(f"{problem}, and the model at {model_path} is gone: restore one of the two, and the run goes on")
    return next((path for path in saved if not checkpoint_folder.problem(Path(path))), saved[0])


def described_at(model_path: str, out_dir: str) -> str:
    """Return where a model's config can be read: `model_path`, or where nothing is there the run's newest checkpoint, whole or not."""
    return next(iter(_instead(model_path, out_dir)), model_path)


def _instead(model_path: str, out_dir: str) -> list[str]:
    """Return the checkpoints of a run, the newest first, that can stand in for a model which is gone; none where it is there."""
    try:
        find_model(model_path, "")
    except FileNotFoundError:
        if Path(model_path).exists():
            raise
        saved = checkpoint_folder.saved_checkpoints(Path(out_dir) / "checkpoints")
        return [str(path) for path in reversed(saved) if is_run(Path(out_dir)) and checkpoint_folder.is_checkpoint(path)]
    return []


def tokenizer_beside(model_path: str) -> str | None:
    """Return the path or hub name of the tokenizer beside a model in any accepted form, None if there is none."""
    if hub.is_hub_name(model_path):
        return model_path
    place = Path(model_path).parent if is_ckpt_pt(model_path) else Path(hub.snapshot_in(model_path))
    if checkpoint_folder.is_checkpoint(place):
        place = checkpoint_folder.model_description(place)
    if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return str(place)
    if (place / "tokenizer.model").is_file():
        return str(place / "tokenizer.model")
    return None


def template_of_run(model_path: str) -> str | None:
    """Return the chat format, chatml or tokenizer, of the data on which the run whose final/ this is was trained; None for other models."""
    description = Path(model_path).parent / "data.json"
    if Path(model_path).name != "final" or not description.is_file():
        return None
    return read_object(description).get("template_name")


def newest(place: str) -> str:
    """Return where the model of a run directory is: final/ if it is as long as the recipe says, else the newest checkpoint.

    A run's folder checkpoints/ means the newest one; any other place is returned as it is. Raises FileNotFoundError for a run that has
    saved nothing yet.
    """
    run = Path(place)
    if not is_run(run):
        saved = checkpoint_folder.saved_checkpoints(run)
        return str(saved[-1]) if saved else place
    final, saved = run / "final", checkpoint_folder.saved_checkpoints(run / "checkpoints")
    lengths = read_facts(run).get("finished")
    if final.is_dir() and lengths is not None:
        recipe = read_recipe(run, *lengths)
        if not saved or all(recipe.get(name) == value for name, value in lengths.items()):
            return str(final)
    if not saved:
        raise FileNotFoundError(f"the run {run} has saved no checkpoint yet")
    return str(saved[-1])


def name_of(place: str) -> str:
    """Return a short name for what lies at `place`, without the folders that it lies in."""
    path = Path(place).resolve() if Path(place).exists() else Path(place)
    if checkpoint_folder.is_checkpoint(path):
        return f"{path.parent.parent.name}-{path.name}"
    if path.name == "final" and (path.parent / "run.json").is_file():
        return path.parent.name
    return path.stem if is_ckpt_pt(path) else path.name
