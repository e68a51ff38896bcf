"""Writes a model as a Hugging Face folder that loads in plain transformers and stops where an answer ends.

A folder appears whole or not at all, and only after it was read back and found equal to what was to be written.
"""

import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from posttrain.common import files
from posttrain.data.chat import ChatFormat
from posttrain.operators.saved_form import count_as_saved

SYSTEM_PROMPT = "system_prompt.txt"  # holds the system prompt that conversations of the data got where they had none


def write_model(state_dict: dict[str, torch.Tensor], description: Path, folder: Path, card: str) -> None:
    """Write weights, the description (a folder of write_description) and the model card. Rank 0 only.

    state_dict has the model's own names, on the CPU. Raises OSError where the folder cannot be written, or reads back otherwise than it was
    written.
    """
    staging, previous = (folder.with_name(folder.name + suffix) for suffix in (".incomplete", ".previous"))
    shutil.rmtree(staging, ignore_errors=True)
    try:
        shutil.copytree(description, staging)
        if AutoConfig.from_pretrained(staging).tie_word_embeddings:
            state_dict = {name: tensor for name, tensor in state_dict.items() if name != "lm_head.weight"}
        save_torch_state_dict(state_dict, staging, max_shard_size="5GB")
        (staging / "README.md").write_text(card, encoding="utf-8")
        _compare(staging, state_dict)
        files.sync_files(staging)
    except (OSError, SafetensorError) as error:  # a full disk raises either, depending on the file
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written: {error}. The run's checkpoints are whole: make room, and the same command writes it"
        ) from error
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    staging.rename(folder)
    files.sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def write_description(model: PreTrainedModel, chat: ChatFormat | None, folder: Path, system_prompt: str | None = None) -> None:
    """Write all of a model's folder but its weights: config, generation config, tokenizer with its template, the data's system prompt."""
    if system_prompt:
        (folder / SYSTEM_PROMPT).write_text(system_prompt, encoding="utf-8")
    config = type(model.config).from_dict({**model.config.to_dict(), "use_cache": True})
    config.architectures = [type(model).__name__]
    if chat is not None:
        tokenizer = chat.tokenizer
        # the tokenizer keeps its own end token, so that its identity does not change: generation_config says where to stop
        stops = [chat.end_id]
        if tokenizer.eos_token_id not in (None, *stops):
            stops.append(tokenizer.eos_token_id)
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
        GenerationConfig(**special, max_new_tokens=512).save_pretrained(folder)
        config.update(special)
        tokenizer.chat_template = chat.jinja
        tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def written_bytes(model: PreTrainedModel) -> int:
    """Return the size in bytes of the model's weights as write_model writes them."""
    return count_as_saved(model) * model.dtype.itemsize


def _compare(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Read the folder back: config and tokenizer must load. Raises OSError for a tensor that is missing, or differs in a bit."""
    missing = set(state_dict)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if not torch.equal(file.get_tensor(name).view(torch.uint8), state_dict[name].contiguous().view(torch.uint8)):
                    raise OSError(f"{path} reads back another {name} than was written: the disk or the memory is faulty")
                missing.discard(name)
    if missing:
        raise OSError(f"{len(missing)} tensors are not there when read back, first {min(missing)}")
    AutoConfig.from_pretrained(folder)
    if (folder / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(folder)
