"""Loads a model from any accepted form: a Hugging Face folder or hub name, a ckpt.pt file, or a checkpoint of a run."""

import pickle
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from posttrain.common import hub
from posttrain.engine import checkpoint_folder, shards
from posttrain.model import ckpt_pt
from posttrain.operators.saved_form import as_saved


def find_model(path: str, how_to_make: str) -> None:
    """Raise FileNotFoundError, which ends with `how_to_make`, unless there is a model at `path`. Reads no weights."""
    place, seen = Path(path), "nothing"
    if ckpt_pt.is_ckpt_pt(path):
        found = place.is_file()
    elif checkpoint_folder.is_checkpoint(place):
        found, seen = (
            (checkpoint_folder.model_description(place) / "config.json").is_file(),
            "a checkpoint outside its run, whose model/ describes it",
        )
    elif (place / "run.json").is_file():
        found, seen = False, "a run; its result is in final/, and checkpoints/step_* are taken, too"
    elif place.is_dir():
        found, seen = (place / "config.json").is_file(), "a folder without config.json"
    elif found := hub.is_hub_name(path):
        found = hub.is_reachable() or isinstance(try_to_load_from_cache(path, "config.json"), str)
        seen = "no such folder; as a hub name it is not in the local cache, and the hub cannot be reached"
    if not found:
        raise FileNotFoundError(f"there is no model at {path} (found {seen}). {how_to_make}")


def load_model(path: str, dtype: torch.dtype | None, how_to_make: str) -> PreTrainedModel:
    """Load the model at `path`, in any accepted form, in `dtype` or, if that is None, in its own dtype.

    Raises FileNotFoundError, which ends with `how_to_make`, if there is none, and ValueError if it is damaged.
    """
    find_model(path, how_to_make)
    if ckpt_pt.is_ckpt_pt(path):
        return ckpt_pt.load_ckpt_pt(path, dtype)
    if checkpoint_folder.is_checkpoint(Path(path)):
        return _from_checkpoint(Path(path), dtype)
    offline = Path(path).is_dir() or not hub.is_reachable()
    try:
        where = {"local_files_only": offline, "trust_remote_code": False}
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True, **where)
    except pickle.UnpicklingError as error:
        raise ValueError(f"the model at {path} cannot be loaded: its file holds more than tensors, which would run as code") from error
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        KeyError,
        ValueError,
    ) as error:  # a file is missing or cut, shapes or the kind of model are others
        raise ValueError(f"the model at {path} cannot be loaded: {error}. {how_to_make}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the model at {path} lacks {len(missing)} tensors that its config.json calls for ({', '.join(missing[:3])}, ...): they "
            "would start at random values. The folder is incomplete, or its config.json belongs to another model"
        )
    return model


def _from_checkpoint(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the model of a run's checkpoint: its float32 master weights, rounded to `dtype` or, if that is None, to the run's dtype.

    Raises ValueError if a file is missing or damaged.
    """
    try:
        facts = checkpoint_folder.read_manifest(path)
        problem = next(
            (found for name, file in facts["files"].items() if (found := checkpoint_folder.file_problem(path, name, file))), None
        )
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    saved = shards.Saved(path, facts["state"])
    dtype = dtype or getattr(torch, facts["recipe"]["dtype"])
    config = AutoConfig.from_pretrained(checkpoint_folder.model_description(path), trust_remote_code=False)
    state = {name.removeprefix("model."): as_saved(name, saved.parameter(name), config).to(dtype) for name in saved.shapes}
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def tokenizer_beside(model_path: str) -> str | None:
    """Return the path or hub name of the tokenizer beside a model in any accepted form, None if there is none."""
    if hub.is_hub_name(model_path):
        return model_path
    folder = Path(model_path).parent if ckpt_pt.is_ckpt_pt(model_path) else Path(model_path)
    if checkpoint_folder.is_checkpoint(folder):
        folder = checkpoint_folder.model_description(folder)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return str(folder)
    if (folder / "tokenizer.model").is_file():
        return str(folder / "tokenizer.model")
    return None
