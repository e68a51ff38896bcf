"""Loads a finished checkpoint, ready to be asked: model, tokenizer, chat format, where answers end. For serving and for evaluation.

It is asked as it was trained: in the same ChatFormat that prepared its data, with the system prompt that its data was given, and up to the
end token of its template.
"""

import contextlib
import reprlib
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.common import hub, terminal
from posttrain.common.errors import first_line
from posttrain.common.files import read_object, read_whole
from posttrain.data import tokenization
from posttrain.data.chat import ChatFormat
from posttrain.engine import checkpoint_folder
from posttrain.model.export import SYSTEM_PROMPT
from posttrain.model.forms import HOW, find_model, is_ckpt_pt, name_of, newest, tokenizer_beside
from posttrain.model.loading import load_model
from posttrain.operators.positions import RowFrequencies, context_of, same_frequencies_until
from posttrain.parallel.script import is_rank_0
from posttrain.run.stored import read_log, read_recipe


class Assistant(NamedTuple):
    """A checkpoint with all that it takes to ask it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat | None  # None where its template cannot be used; it can still continue a text
    why_no_chat: str  # the reason, where `chat` is None
    system_prompt: str | None
    has_template: bool  # whether it has a chat template of its own; else it is asked in ChatML
    stops: frozenset[int]  # ids that end an answer
    context: int  # tokens of prompt and answer together
    suggestions: tuple[str, ...] = ()  # prompts whose answers were sampled during its training
    folder: str | None = None  # a Hugging Face folder or hub name with just these weights; None where there is none

    @property
    def context_in_batches(self) -> int:
        """How many tokens texts may have that are read together: beyond them rotary frequencies may depend on each text's length."""
        return min(self.context, same_frequencies_until(self.model.config.get_text_config()) or self.context)


def quiet_libraries() -> None:
    """Let transformers print errors only, and no progress bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def dtype_on(device: str, given: str | None) -> torch.dtype | None:
    """Return what --dtype means: where it is not given float32 on a CPU, else None, the checkpoint's own."""
    return getattr(torch, given) if given else torch.float32 if device == "cpu" else None


def load(place: str, name: str | None = None, tokenizer: str | None = None, dtype: torch.dtype | None = None, device="cpu") -> Assistant:
    """Load the checkpoint at `place`, in `dtype` (None: its own), on the device.

    `tokenizer` is for a checkpoint without one beside it. One without a chat template of its own is asked in ChatML, which is what SFT
    would teach it. Raises FileNotFoundError or ValueError with what was seen, what was expected and what to do.
    """
    path, notes = newest(place), []
    model, beside = _load_model(path, tokenizer, dtype, notes)
    path = hub.snapshot_in(path)
    RowFrequencies(model)
    loaded, template = _load_tokenizer(beside)
    chat, why_no_chat = _chat_format(loaded, template)
    grown = tokenization.grow_embeddings(model, loaded)
    for note in notes if is_rank_0() else ():
        terminal.say(f"{name or name_of(place)}: {note}")
    is_training_state = checkpoint_folder.is_checkpoint(Path(path))
    description = checkpoint_folder.model_description(Path(path)) if is_training_state else Path(path)
    return Assistant(
        name=name or name_of(place),
        model=model.to(device).eval(),
        tokenizer=loaded,
        chat=chat,
        why_no_chat=why_no_chat,
        system_prompt=_system_prompt(description),
        has_template=template == "tokenizer",
        stops=_stops(description, loaded, chat),
        context=context_of(model.config.get_text_config()),
        suggestions=_suggestions(Path(path).resolve()),
        folder=None if grown or notes or is_training_state or is_ckpt_pt(path) else path,
    )


def _load_model(path: str, tokenizer: str | None, dtype: torch.dtype | None, notes: list[str]) -> tuple[PreTrainedModel, str]:
    """Return the model, and where its tokenizer is: beside it, else `tokenizer`. What is missing is said before weights are read.

    `notes` gets what loading says about the model.
    """
    beside = tokenizer_beside(path) or tokenizer
    find_model(path, HOW)
    if beside is None:
        raise ValueError(f"{path} has no tokenizer beside it; name its folder or SentencePiece .model file with --tokenizer")
    return load_model(path, dtype, HOW, notes.append), beside


def _load_tokenizer(beside: str) -> tuple[PreTrainedTokenizerBase, str]:
    """Return the tokenizer, and which template it is asked in: its own ("tokenizer") where it has one, else "chatml"."""
    if not beside.endswith(".model"):
        own = tokenization.load_tokenizer(beside, "tokenizer")
        if own.chat_template:
            return own, "tokenizer"
    return tokenization.load_tokenizer(beside, "chatml"), "chatml"


def _chat_format(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[ChatFormat | None, str]:
    """Return the chat format, or None and why the template cannot be used."""
    try:
        return ChatFormat(tokenizer, template), ""
    except ValueError as error:
        return None, first_line(error)


def _system_prompt(description: Path) -> str | None:
    path = description / SYSTEM_PROMPT
    return read_whole(path) if path.is_file() else None


def _suggestions(path: Path) -> tuple[str, ...]:
    """Return the first sample_prompts of the run that `path` belongs to; none where it belongs to no run, or a file is gone or damaged.

    They are those of the run's own record: the file that its recipe names may be any of this machine's, and all clients see them.
    """
    run = next((folder for folder in (path.parent, path.parent.parent) if (folder / "recipe.yaml").is_file()), None)
    with contextlib.suppress(ValueError, FileNotFoundError):
        if run and read_recipe(run).get("sample_prompts"):
            asked = [one["prompt"] for record in read_log(run, "samples.jsonl") for one in record["samples"]]
            return tuple(dict.fromkeys(asked))[:6]
    return ()


def _stops(description: Path, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat | None) -> frozenset[int]:
    """Return the ids that end an answer: those of the tokenizer, of the template, and of the model's generation_config.json."""
    stops = {tokenizer.eos_token_id, chat.end_id if chat else None}
    path, most = description / "generation_config.json", max(tokenizer.get_vocab().values(), default=0)
    if path.is_file():
        own = read_object(path).get("eos_token_id")
        for token in own if isinstance(own, list) else [own]:
            if token is not None and (type(token) is not int or not 0 <= token <= most):
                raise ValueError(f"{path} has the stop token {reprlib.repr(token)}; expected ids from 0 to {most}, or null")
            stops.add(token)
    return frozenset(stops - {None})
