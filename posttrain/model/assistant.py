"""A finished checkpoint, ready to be asked: model, tokenizer, chat format, where it stops. For serving and for evaluation.

What it is asked with is what it was trained with: the same ChatFormat that prepared its data, the system prompt that its data was given,
and the end token of its template.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.common.errors import first_line
from posttrain.common.files import read_prompts
from posttrain.data import tokenization
from posttrain.data.chat import ChatFormat
from posttrain.engine import checkpoint_folder
from posttrain.model import ckpt_pt
from posttrain.model.export import SYSTEM_PROMPT
from posttrain.model.loading import find_model, load_model, tokenizer_beside

HOW = "Name a Hugging Face folder, a run directory, a folder of a run's checkpoints, or a ckpt.pt file"


class Assistant(NamedTuple):
    """`chat` is None for a model whose template cannot be used; `why_no_chat` says why. It can still go on with a text."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat | None
    why_no_chat: str
    system_prompt: str | None
    has_template: bool  # of its own; else it is asked in ChatML
    stops: frozenset[int]  # ids that end an answer
    context: int  # tokens of prompt and answer together
    suggestions: tuple[str, ...] = ()  # prompts that its training was watched by
    folder: str | None = None  # a Hugging Face folder or hub name with just these weights; None where there is none


def newest(place: str) -> str:
    """Where the model of a run directory is: final/ if that is as long as the recipe says, else the newest checkpoint. Others are as given.

    Raises FileNotFoundError for a run that has saved nothing yet.
    """
    run = Path(place)
    if not (run / "run.json").is_file():
        return place
    final, saved = run / "final", checkpoint_folder.saved_checkpoints(run / "checkpoints")
    lengths = json.loads((run / "run.json").read_text()).get("finished")
    if final.is_dir() and lengths is not None:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        if not saved or all(recipe.get(name) == value for name, value in lengths.items()):
            return str(final)
    if not saved:
        raise FileNotFoundError(f"the run {run} has saved no checkpoint yet")
    return str(saved[-1])


def name_of(place: str) -> str:
    """A short name for what lies at `place`, without the folders that it lies in."""
    path = Path(place).resolve() if Path(place).exists() else Path(place)
    if checkpoint_folder.is_checkpoint(path):
        return f"{path.parent.parent.name}-{path.name}"
    if path.name == "final" and (path.parent / "run.json").is_file():
        return path.parent.name
    return path.stem if ckpt_pt.is_ckpt_pt(path) else path.name


def named(given: list[str]) -> dict[str, str]:
    """Places by name, of [NAME=]DIR each. Raises ValueError where two have the same name."""
    pairs = []
    for one in given:
        found = re.fullmatch(r"([\w.@-]+)=(.+)", one)
        pairs.append((found[1], found[2]) if found and not Path(one).exists() else (name_of(one), one))
    if len(dict(pairs)) < len(pairs):
        names = ", ".join(name for name, _ in pairs)
        raise ValueError(f"two checkpoints have the same name ({names}); give each its own: --checkpoint NAME=DIR")
    return dict(pairs)


def check_tokenizer(tokenizer: str | None, places: Iterable[str]) -> None:
    """Raises ValueError for a --tokenizer that no checkpoint needs."""
    if tokenizer and all(tokenizer_beside(newest(place)) for place in places):
        raise ValueError("--tokenizer would not be read: every checkpoint has its own beside it; leave it out")


def dtype_on(device: str, given: str | None) -> torch.dtype | None:
    """What --dtype means: where it is not given float32 on a CPU, else the checkpoint's own."""
    return getattr(torch, given) if given else torch.float32 if device == "cpu" else None


def load(place: str, name: str | None = None, tokenizer: str | None = None, dtype: torch.dtype | None = None, device="cpu") -> Assistant:
    """The checkpoint at `place`, in `dtype` (None: its own), on the device.

    `tokenizer` is for a checkpoint without one beside it. One without a chat template of its own is asked in ChatML, which is what SFT
    would teach it. Raises FileNotFoundError or ValueError with what was seen, what was expected and what to do.
    """
    found = newest(place)
    beside = tokenizer_beside(found) or tokenizer
    find_model(found, HOW)
    if beside is None:
        raise ValueError(f"{found} has no tokenizer beside it; name its folder or SentencePiece .model file with --tokenizer")
    model = load_model(found, dtype, HOW)
    own = tokenization.load_tokenizer(beside, "tokenizer") if not beside.endswith(".model") else None
    template = "tokenizer" if own is not None and own.chat_template else "chatml"
    loaded = own if template == "tokenizer" else tokenization.load_tokenizer(beside, "chatml")
    chat, why_no_chat = None, ""
    try:
        chat = ChatFormat(loaded, template)
    except ValueError as error:
        why_no_chat = first_line(error)
    grown = tokenization.grow_embeddings(model, loaded)
    trained = checkpoint_folder.is_checkpoint(Path(found))
    description = checkpoint_folder.model_description(Path(found)) if trained else Path(found)
    return Assistant(
        name or name_of(place),
        model.to(device).eval(),
        loaded,
        chat,
        why_no_chat,
        _system_prompt(description),
        template == "tokenizer",
        frozenset(_stops(description, loaded, chat)),
        model.config.max_position_embeddings,
        _suggestions(Path(found)),
        None if grown or trained or ckpt_pt.is_ckpt_pt(found) else found,
    )


def _system_prompt(description: Path) -> str | None:
    path = description / SYSTEM_PROMPT
    return path.read_text() if path.is_file() else None


def _suggestions(found: Path) -> tuple[str, ...]:
    """The first of the run's sample_prompts, where it is a run's and the file is still there."""
    run = next((folder for folder in (found.parent, found.parent.parent) if (folder / "recipe.yaml").is_file()), None)
    prompts = yaml.safe_load((run / "recipe.yaml").read_text()).get("sample_prompts") if run else None
    return tuple(read_prompts(Path(prompts), 6)) if prompts and Path(prompts).is_file() else ()


def _stops(description: Path, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat | None) -> set[int]:
    stops = {tokenizer.eos_token_id, chat.end_id if chat else None}
    if (description / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(description).eos_token_id
        stops.update(own if isinstance(own, list) else [own])
    return stops - {None}
