"""Writes a model as a Hugging Face folder that loads in plain transformers and stops where an answer ends.

A folder appears whole or not at all, and only after it was read back, opened by transformers, and found to be the model in memory.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from posttrain.common import files
from posttrain.common.errors import reason
from posttrain.data.chat import ChatFormat
from posttrain.model.classes import PICTURES, class_in
from posttrain.model.describe import write_config, write_generation_config, write_tokenizer
from posttrain.model.sample_rows import plain_logps, sample_rows
from posttrain.operators.layers import multiplies_in_float32, plain_rotary
from posttrain.operators.saved_form import count_as_saved, persistent_buffers

SYSTEM_PROMPT = "system_prompt.txt"  # holds the system prompt that conversations of the data got where they had none
FARTHEST = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}  # mean difference in nats a token that rounding explains

MEMORY = 1.2  # times the size of its weights is what it takes to open a model
ADVICE = (
    "it would be another model than was trained. The checkpoints are whole, and convert.py makes folders of them without this comparison; "
    "please report the architecture"
)


class AnotherModel(ValueError):
    """Says that a written folder is another model than the one in memory."""


def write_model(
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    describe: Callable[[Path], object],
    folder: Path,
    card: str,
    expected: torch.Tensor | None = None,
) -> str | None:
    """Write a model's folder: weights, what `describe` writes into it, and the model card. Rank 0 only.

    `state_dict` has the model's own names, on the CPU, and is emptied. `expected` are the model's log-probs of sample_rows; the folder, as
    plain transformers opens it, must give the same. Returns why that was not looked at, None if it was. Raises OSError where the folder
    cannot be written or reads back otherwise than it was written, and AnotherModel where it opens as another model.
    """
    if folder.parent.is_dir():
        files.sweep(folder.parent, folder.name)
    staging = files.staging_name(folder)
    previous = files.staging_name(folder.with_name(f"{folder.name}.previous"))
    try:
        staging.mkdir(parents=True)
        describe(staging)
        state = as_in_files(model, state_dict)
        state_dict.clear()
        save_torch_state_dict(state, staging, max_shard_size="5GB")
        (staging / "README.md").write_text(card, encoding="utf-8")
        _compare(staging, state)
        state.clear()  # opening the folder takes as much memory
        with plain_rotary():
            unseen = _open_again(staging, folder.name, model.dtype, expected)
        _allow_reading(staging)
        files.sync_files(staging)
    except AnotherModel:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except (OSError, SafetensorError) as error:  # a full disk raises either, depending on the file
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written: {error}. The run's checkpoints are whole: make room, and the same command writes it"
        ) from error
    if folder.exists():
        folder.rename(previous)
    staging.rename(folder)
    files.sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)
    return unseen


def write_description(model: PreTrainedModel, chat: ChatFormat | None, folder: Path, system_prompt: str | None = None) -> list[str]:
    """Write all of a model's folder but its weights: config, generation config, tokenizer with its templates, the data's system prompt.

    Returns notes on what the base had and the folder has not.
    """
    if system_prompt:
        (folder / SYSTEM_PROMPT).write_text(system_prompt, encoding="utf-8")
    write_config(model, chat, folder)
    for name in PICTURES:
        if (own := Path(model.name_or_path, name)).is_file():
            shutil.copyfile(own, folder / name)
    if chat is None:
        return []
    write_generation_config(model, chat, folder)
    return write_tokenizer(chat, folder)


def written_bytes(model: PreTrainedModel) -> int:
    """Return the size in bytes of the model's weights as write_model writes them."""
    return count_as_saved(model) * model.dtype.itemsize + sum(buffer.nbytes for buffer in persistent_buffers(model).values())


def as_in_files(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state under the names that files have: of tied tensors one, and experts one by one, which transformers 5 holds merged."""
    own = dict(model.named_parameters())  # of parameters that are one in memory only the first name
    others = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in own]
    conversions, model._weight_conversions = getattr(model, "_weight_conversions", None), None  # not those of the base's own old names
    try:
        found = revert_weight_conversion(model, {name: tensor for name, tensor in state.items() if name not in others})
    finally:
        model._weight_conversions = conversions
    # an expert is a view of all: files hold each tensor by itself
    return {name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor for name, tensor in found.items()}


def _compare(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Read the weights back. Raises OSError for a tensor that is missing, or differs in a bit."""
    missing = set(state)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if not torch.equal(_bytes(file.get_tensor(name)), _bytes(state[name])):
                    raise OSError(f"{path} reads back another {name} than was written: the disk or the memory is faulty")
                missing.discard(name)
    if missing:
        raise OSError(f"{len(missing)} tensors are not there when read back, first {min(missing)}")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@torch.no_grad()
def _open_again(folder: Path, name: str, dtype: torch.dtype, expected: torch.Tensor | None) -> str | None:
    """Open the folder by plain transformers, on the CPU; returns why not where this machine has too little memory for that.

    `name` is the one that the folder will have. Raises AnotherModel for tensors that lack or are too many, and for other log-probs.
    """
    size, free = sum(path.stat().st_size for path in folder.glob("*.safetensors")), psutil.virtual_memory().available
    if MEMORY * size > free:
        return f"{name} was not opened to compare it: that takes {MEMORY * size / 1e9:.0f} GB, {free / 1e9:.0f} GB of memory are free"
    is_slow = multiplies_in_float32(torch.device("cpu"), dtype)  # then in float32, if that fits
    computed_in = torch.float32 if is_slow and MEMORY * size * torch.float32.itemsize / dtype.itemsize < free else dtype
    try:
        model, report = class_in(folder).from_pretrained(folder, dtype=computed_in, output_loading_info=True)
        seen = (
            torch.cat([plain_logps(model.eval(), row) for row in sample_rows(model.config.get_text_config())])
            if expected is not None
            else None
        )
    except Exception as error:  # of any kind: an architecture's code may fail anywhere
        raise AnotherModel(f"{name} was not written: transformers cannot open it ({reason(error)}); {ADVICE}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[what])):
            raise AnotherModel(f"{name} was not written: opened by transformers it has {len(names)} {what}, first {names[0]}; {ADVICE}")
    difference = (seen - expected).abs().mean().item() if seen is not None else 0.0
    if not difference <= FARTHEST[dtype]:
        raise AnotherModel(
            f"{name} was not written: opened by transformers it gives log-probs that are {difference:.3g} nats a token from those "
            f"of the trained model (limit {FARTHEST[dtype]}); {ADVICE}"
        )
    return None


def _allow_reading(folder: Path) -> None:
    """Give all files the mode that the umask allows: safetensors (0.8) makes its own readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
