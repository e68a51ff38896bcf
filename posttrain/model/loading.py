"""Loads a model from any accepted form: a Hugging Face folder or hub name, a ckpt.pt file, or a checkpoint of a run."""

import pickle
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from posttrain.common import hub
from posttrain.engine import checkpoint_folder, shards
from posttrain.model import ckpt_pt
from posttrain.model.forms import find_model, is_ckpt_pt
from posttrain.operators.saved_form import as_saved
from posttrain.run.stored import model_problem


def load_model(path: str, dtype: torch.dtype | None, how_to_make: str) -> PreTrainedModel:
    """Load the model at `path`, in any accepted form, in `dtype` or, if that is None, in its own dtype.

    Raises FileNotFoundError, which ends with `how_to_make`, if there is none, and ValueError if it is damaged.
    """
    find_model(path, how_to_make)
    if is_ckpt_pt(path):
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
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings != (head.weight is embedding.weight):
        model.config.tie_word_embeddings = not model.config.tie_word_embeddings
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
        run = checkpoint_folder.model_description(path).parent
        if not problem and (run / "run.json").is_file():
            problem = model_problem(run)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    saved = shards.Saved(path, facts["state"])
    dtype = dtype or getattr(torch, facts["recipe"]["dtype"])
    config = AutoConfig.from_pretrained(checkpoint_folder.model_description(path), trust_remote_code=False)
    state = {name: as_saved(name, saved.parameter(name), config).to(dtype) for name in saved.shapes} | saved.buffers()
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
