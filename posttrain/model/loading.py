"""Loads a model from any accepted form: a Hugging Face folder or hub name, a ckpt.pt file, or a checkpoint of a run.

A folder is opened by transformers. What transformers would leave out, make up or ask about is refused here by name, or done and said; code
that comes with a model is never run, unless own_code has registered it.
"""

import contextlib
import copy
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from posttrain.common import hub
from posttrain.common.errors import reason, shown, shown_name
from posttrain.common.files import read_object
from posttrain.engine import checkpoint_folder, shards
from posttrain.model import ckpt_pt, folder
from posttrain.model.classes import class_of
from posttrain.model.forms import find_model, is_ckpt_pt
from posttrain.model.left_out import WRAPPERS, sort_out, unwrapped
from posttrain.model.torch_file import refuse_damaged, why_not_plain
from posttrain.operators import positions
from posttrain.operators.saved_form import as_saved
from posttrain.run.stored import final_problem, is_run, model_problem


def load_model(path: str, dtype: torch.dtype | None, how_to_make: str, say: Callable[[str], None] = print) -> PreTrainedModel:
    """Load the model at `path`, in any accepted form, in `dtype` or, if that is None, in its own dtype.

    `say` gets a sentence about each thing that was done on the way, such as tensors left out. Raises FileNotFoundError, which ends with
    `how_to_make`, if there is no model, and ValueError if it is damaged, or of a kind that is not trained.
    """
    find_model(path, how_to_make)
    if is_ckpt_pt(path):
        return ckpt_pt.load_ckpt_pt(path, dtype)
    if checkpoint_folder.is_checkpoint(Path(path)):
        return _from_checkpoint(Path(path), dtype)
    place = hub.snapshot_in(path)
    run = Path(place).resolve().parent
    if Path(place).resolve().name == "final" and is_run(run) and (problem := final_problem(run)):
        raise ValueError(
            f"{problem}. Restore the file from a copy, or remove {run}/final, and the run's command writes it again. A model that is "
            "changed on purpose belongs into another folder"
        )
    if place != path:
        say(f"{path} is a folder of the hub's cache: its snapshot {Path(place).name} is taken")
    config = read_config(place)
    if getattr(config, "auto_map", None) and type(config).__module__.startswith("transformers."):
        say(f"config.json names code of its own (auto_map), which is not run: the model is transformers' own {config.model_type}")
    return _from_folder(place, config, dtype, say)


def read_config(path: str) -> PreTrainedConfig:
    """Return the config of a Hugging Face folder or hub name. Raises ValueError unless it is a causal language model's."""
    raw = folder.examine_config(_files(path))
    kind = raw["model_type"]
    for name in ("dtype", "torch_dtype"):
        if (value := raw.get(name)) is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
            raise ValueError(f"{path}/config.json has {name} {value!r}; expected the name of one, such as float32 or bfloat16")
    for name in positions.MOST_POSITIONS:
        if isinstance(most := raw.get(name), int) and most < 2:
            raise ValueError(f"{path}/config.json has {name} {most}, how many tokens a row may have; expected 2 or more")
    _refuse_unknown_type(path, raw)
    with _in_one_sentence(path):
        config = AutoConfig.from_pretrained(path, local_files_only=_is_here(path), trust_remote_code=False)
        _take_from(config)
    if class_of(config) is None:
        raise ValueError(f"{path} is a model of type {kind!r}, which is not a causal language model; name one that is")
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and rows > 0 and not -rows <= pad < rows:
        raise ValueError(f"{path}/config.json has pad_token_id {pad}, but vocab_size {rows}, whose ids end at {rows - 1}: set it to null")
    return config


def _refuse_unknown_type(path, config: dict) -> None:
    """Raise ValueError for the content of a config.json whose type transformers does not know; own_code may have told it of one."""
    kind, version = config["model_type"], transformers.__version__
    if kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ValueError(
                f"{path} is a model of type {kind!r}, which only the code that comes with it can compute (auto_map in config.json), and "
                "such code is not run unasked: read it, and set trust_remote_code, or name a model of a type that transformers "
                f"{version} knows"
            )
        raise ValueError(f"{path} is a model of type {kind!r}, which transformers {version} does not know; a newer one may")


def _take_from(config: PreTrainedConfig) -> None:
    """Set what is not config.json's to choose: it could name any kernel of the hub's, which would be fetched and run for every model."""
    config._attn_implementation = config._experts_implementation = None
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False


def _from_folder(path: str, config: PreTrainedConfig, dtype: torch.dtype | None, say: Callable[[str], None]) -> PreTrainedModel:
    """Load the model of a Hugging Face folder or hub name. Raises ValueError."""
    is_folder = Path(path).is_dir()
    if is_folder:
        shapes = _shapes_in(path)
        _refuse_shapes(path, config, shapes)
    method = folder.dequantization({"quantization_config": getattr(config, "quantization_config", None)})
    if method:
        config.quantization_config["dequantize"] = True
        dtype = dtype or config.dtype or torch.bfloat16
    with _in_one_sentence(path):
        model, report = class_of(config).from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            key_mapping=dict.fromkeys(WRAPPERS, ""),
            ignore_mismatched_sizes=True,  # else transformers' error says only that there are some; they are refused below
            output_loading_info=True,
            local_files_only=_is_here(path),
        )
    if not is_folder:
        shapes = _shapes_in(path)  # transformers has downloaded the files by now
    notes, unexpected = sort_out(model, shapes, set(report["unexpected_keys"]))
    _refuse_differences(path, report, unexpected)
    if len(names := {unwrapped(name) for name in shapes}) < len(shapes):
        raise ValueError(f"{path} has {len(shapes) - len(names)} tensors twice, with and without a wrapper's prefix: save the model again")
    if method:
        _forget_quantization(model, dtype)
        form = str(dtype).removeprefix("torch.")
        say(f"its weights are {method}: they are multiplied out to {form}, and never rounded to {method} again")
    for note in notes:
        say(note)
    if _untie(model):
        say("config.json says that the head is the embedding, but the file holds two matrices: both are used, and written")
    return model


def _forget_quantization(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model whose weights were multiplied out on loading one like any other.

    Transformers 5.23 leaves what was not quantized in the file's dtype, and would quantize all weights again when it saves them, those of
    embedding and head, too.
    """
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model._weight_conversions, model.is_quantized = None, False


def _untie(model: PreTrainedModel) -> bool:
    """Correct the config of a model whose head is not its embedding although the config says so; returns whether it is such a one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or not getattr(model.config, "tie_word_embeddings", False):
        return False
    model.config.tie_word_embeddings = False
    return True


def _refuse_differences(path: str, report: dict, unexpected: list[str]) -> None:
    """Raise ValueError if the weights are not exactly those that config.json calls for; `report` is from_pretrained's."""
    for name, seen, expected in sorted(report["mismatched_keys"]):
        raise _other_shape(path, name, seen, expected)
    missing = sorted(report["missing_keys"])
    if any(folder.QUANTIZED.search(name) for name in unexpected):
        raise folder.quantized(path, f"its weights hold {next(filter(folder.QUANTIZED.search, unexpected))}")
    folder.refuse_adapter_state(path, unexpected)
    held = f"{len(unexpected)} unexpected tensors ({_some(unexpected)})"
    if pair := _same_with_another_beginning(missing, unexpected):
        raise ValueError(
            f"the model at {path} has other names for its tensors than its config.json calls for, such as {pair[0]} for {pair[1]}. It "
            "seems to be a part of another model, such as one with images: load it by its own class, and save that part alone"
        )
    if missing:
        others = f", and has {held}" if unexpected else ""
        raise ValueError(
            f"the model at {path} lacks {len(missing)} tensors that its config.json calls for ({_some(missing)}), which would start at "
            f"random values{others}. The folder is incomplete, or its config.json belongs to another model"
        )
    if unexpected:
        raise ValueError(
            f"the model at {path} has {held}, which the model that its config.json describes does not have: they would be lost. Correct "
            "config.json (layers, biases, architecture), or remove them from the weights if they are not wanted"
        )


def _same_with_another_beginning(missing: list[str], unexpected: list[str]) -> tuple[str, str] | None:
    """Return the first unexpected tensor and the missing one whose name ends alike, if there is one for each; else None."""
    ends = {f".{name.removeprefix('model.')}": name for name in missing}
    pairs = [(name, next((ends[end] for end in ends if name.endswith(end)), None)) for name in unexpected]
    return pairs[0] if pairs and all(other for _, other in pairs) else None


def _refuse_shapes(path: str, config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a tensor of another shape than config.json calls for, before memory is taken for what may be far too large.

    `shapes`: by the tensors' names in the files.
    """
    with _in_one_sentence(path):
        with torch.device("meta"):
            model = class_of(config)._from_config(copy.deepcopy(config), dtype=torch.float32)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, seen in ((unwrapped(name), shape) for name, shape in shapes.items()):
        whole = name if name in expected else f"{model.base_model_prefix}.{name}"  # a base model's file lacks the prefix
        if expected.get(whole, seen) != seen:
            raise _other_shape(path, name, seen, expected[whole])


def _other_shape(path: str, name: str, seen, expected) -> ValueError:
    """Return the error for a tensor of another shape than config.json calls for."""
    return ValueError(
        f"the model at {path} has other shapes than its config.json calls for: {name} is {list(seen)} in the file, {list(expected)} by "
        "config.json. One of the two belongs to another model"
    )


def _some(names: list[str]) -> str:
    """Return the first names of a list."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_here(path: str) -> bool:
    """Whether files are to be read from this machine only: of a folder, or of a hub name where the hub cannot be reached."""
    return Path(path).is_dir() or not hub.is_reachable()


def _files(path: str) -> Path:
    """Return the folder that holds a model's files: itself, or for a hub name the cache's, into which config.json is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    with _in_one_sentence(path):
        return Path(hf_hub_download(path, "config.json", local_files_only=_is_here(path))).parent


def _shapes_in(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the files of a folder or hub name, by its name there. Raises ValueError."""
    place = _files(path)
    found: dict[str, folder.Tensor] = {}
    config = read_object(place / "config.json")
    for file in folder.weight_files(place, config):
        one = folder.read_header(file) if file.suffix == ".safetensors" else _tensors_of(file)
        folder.refuse_twice(file, found, one)
        found |= one
    folder.refuse_quantized(place, found, config)
    return {name: tensor.shape for name, tensor in found.items()}


def _tensors_of(file: Path) -> dict[str, folder.Tensor]:
    """Return what a file of torch.save says of each tensor, by its name. Raises ValueError for one that is no state dict, or damaged."""
    with file.open("rb") as opened:
        begin = opened.read(64)
    if not begin.startswith((b"PK", b"\x80")):  # a zip archive; versions before torch 1.6 wrote a pickle
        raise ValueError(f"{file} is no file of torch.save (it begins with {begin[:20]!r}): download it again")
    if begin.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is cut or damaged: copy it again")
    with _in_one_sentence(file.parent):
        state = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        seen = ", ".join(map(repr, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{file} holds something else than a model's tensors by name (its keys: {seen}), such as a training's whole state: save "
            "model.state_dict() alone, or use save_pretrained()"
        )
    if wrong := [name for name in state if not isinstance(name, str)]:
        raise ValueError(f"{file} has {shown(wrong[0])} where a tensor's name should be: save the model again with save_pretrained()")
    for name, value in state.items():
        if why_not := why_not_plain(value):
            raise ValueError(f"{file}: the tensor {shown_name(name)} {why_not}; save the model again with save_pretrained()")
    refuse_damaged(file)
    return {name: folder.Tensor(str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in state.items()}


def _named_in_config(path, error: Exception) -> str:
    """Return where config.json has the name that transformers does not know, for a KeyError; else an empty text."""
    place = Path(path) / "config.json"
    if not isinstance(error, KeyError) or not error.args or not place.is_file():
        return ""
    waiting = list(read_object(place).items())
    while waiting:
        name, value = waiting.pop()
        if value == error.args[0]:
            return f", which {place} has as {name}, and transformers {transformers.__version__} does not know"
        waiting += value.items() if isinstance(value, dict) else []
    return ""


@contextlib.contextmanager
def _in_one_sentence(path) -> Iterator[None]:
    """Raise ValueError, with one sentence of the reason, for whatever is raised inside while a model is opened.

    Inside, transformers prints errors only: its reports of tensors are judged here, and point to options that no command has.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"the model at {path} cannot be loaded: its file holds more than tensors, which would run as code") from error
    except GatedRepoError as error:
        raise ValueError(
            f"the model at {path} cannot be downloaded: its licence must be accepted on its page, https://hf.co/{path}; then log in: "
            "hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the hub has no model {path}; if it is private, log in: hf auth login") from error
    except Exception as error:  # of any kind: what a config.json or a file of somebody else's holds may fail anywhere in transformers
        raise ValueError(f"the model at {path} cannot be loaded: {reason(error)}{_named_in_config(path, error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _from_checkpoint(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the model of a run's checkpoint: its float32 master weights, rounded to `dtype` or, if that is None, to the run's dtype.

    Raises ValueError if a file is missing or damaged.
    """
    problem, run = checkpoint_folder.problem(path), checkpoint_folder.model_description(path).parent
    if not problem and is_run(run):
        problem = model_problem(run)
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    facts = checkpoint_folder.read_manifest(path)
    saved = shards.Saved(path, facts["state"])
    dtype = dtype or getattr(torch, facts.get("recipe", {"dtype": "float32"})["dtype"])
    description = checkpoint_folder.model_description(path)
    _refuse_unknown_type(path, read_object(description / "config.json"))
    with _in_one_sentence(path):
        config = AutoConfig.from_pretrained(description, trust_remote_code=False)
        _take_from(config)
        kind = getattr(transformers, config.architectures[0], None) or class_of(config)
    state = {name: as_saved(name, saved.parameter(name), config).to(dtype) for name in saved.shapes} | saved.buffers()
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    with _in_one_sentence(path):
        model, report = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
        if (description / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(description)
    if lacking := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise ValueError(
            f"{path} holds no whole model: {len(lacking)} tensors, first {lacking[0]}, are there or in {description / 'config.json'} only. "
            "Versions before 0.2 saved no buffers: take the run's final/, or go on from the model that it began with"
        )
    _untie(model)
    return model
