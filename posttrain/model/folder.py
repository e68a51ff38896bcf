"""Examines a Hugging Face folder before anything is loaded: one that cannot be trained, or is not whole, is refused in one sentence.

Imports no torch, so that a command answers at once. Of the weights it reads the headers of safetensors files: names, dtypes and shapes.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from posttrain.common import hub
from posttrain.common.errors import shown, shown_name
from posttrain.common.files import read_object, require_file

WEIGHTS, INDEX = ("model.safetensors", "pytorch_model.bin"), ".index.json"  # in the order in which transformers looks for them
SMALL_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json")
OBJECTS = ("generation_config.json", "tokenizer_config.json")  # transformers leaves out the first, without a word, where it is damaged
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")  # as PEFT writes them
MERGE = "PEFT's merge_and_unload(), then save_pretrained()"
DEQUANTIZED = {"fp8": "FP8", "mxfp4": "MXFP4"}  # what transformers multiplies out while it loads, by quant_method in config.json
# tensors of theirs: what a weight, and an activation, are divided by; of MXFP4 the weights, too
SCALES = re.compile(r"\.(weight_scale_inv|activation_scale|(gate_up|down)_proj_(blocks|scales))$")
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # of ModelOpt, AutoGPTQ and AutoAWQ
# tensors that only a quantized layer has: of GPTQ and AWQ, bitsandbytes, FP8 and compressed-tensors, MXFP4
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight\.(absmax|quant_map|quant_state\..+)|weight_(scale|scale_inv|scale_2|packed)|(gate_up|down)_proj_(blocks|scales))$"
)
FP8 = ("F8_E4M3", "F8_E5M2", "float8_e4m3fn", "float8_e5m2")
FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")  # safetensors' names and torch's
LONGEST_HEADER = 100_000_000  # bytes, as safetensors bounds them
OTHER_TASKS = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM)|RewardModel|ForReward")


class Tensor(NamedTuple):
    """What a file says of a tensor without its values."""

    dtype: str  # e.g. BF16, as safetensors names it, or torch's name
    shape: tuple[int, ...]


def refuse_file(path: str) -> None:
    """Raise ValueError, with what to do, for a file that is named where a model is expected and is no ckpt.pt."""
    folder = Path(path).parent
    if path.lower().endswith(".gguf"):
        raise ValueError(f"{path} is a GGUF file, llama.cpp's form: name the Hugging Face folder that it was made from")
    beside = (folder / "config.json").is_file()
    whole = f"name its folder, {folder}" if beside else "expected a folder with config.json, weights and tokenizer, or a ckpt.pt"
    raise ValueError(f"{path} is a file, not a model: {whole}")


def refuse_other_forms(folder: Path) -> str:
    """Return what a folder without config.json is. Raises ValueError, with what to do, for forms of a model that are not taken."""
    names = {one.name for one in folder.iterdir()}
    if ADAPTER[0] in names:
        base = read_object(folder / ADAPTER[0]).get("base_model_name_or_path") or "another model"
        raise ValueError(f"{folder} is {_adapter(folder)} of {base}, not a model: merge it into that first ({MERGE}), and name the result")
    if gguf := sorted(name for name in names if name.lower().endswith(".gguf")):
        raise ValueError(f"{folder} holds GGUF ({gguf[0]}), llama.cpp's form: name the Hugging Face folder that it was made from")
    if "zero_to_fp32.py" in names:
        raise ValueError(f"{folder} is DeepSpeed's checkpoint: make a model of it with its zero_to_fp32.py, and put config.json beside")
    if "params.json" in names:
        raise ValueError(f"{folder} holds a model in its maker's own form (params.json): name its Hugging Face folder, with config.json")
    inner = sorted(str(one) for one in folder.iterdir() if (one / "config.json").is_file())
    return "a folder without config.json" + (f"; there is one in {inner[0]}" if inner else "")


def examine(folder: Path, weights: bool = True) -> None:
    """Raise ValueError or FileNotFoundError, with what to do, for a folder that cannot be trained; `weights`: look at these, too."""
    config = examine_config(folder)
    if not weights:
        return
    hub.refuse_pointers(folder, [*SMALL_FILES, *(str(file.relative_to(folder)) for file in weight_files(folder, config))])
    tensors = read_headers(folder, config)
    refuse_quantized(folder, tensors, config)
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            raise ValueError(
                f"{folder} is not whole: {name} has shape {list(tensor.shape)}, as when a rank of ZeRO-3 saves its own share. Make the "
                "model anew from the training's checkpoint, with DeepSpeed's zero_to_fp32.py"
            )
    refuse_adapter_state(folder, tensors)
    layers = config.get("num_hidden_layers")
    if tensors and isinstance(layers, int) and layers > len(tensors):  # transformers would build them all before it compares
        raise ValueError(
            f"{folder / 'config.json'} says num_hidden_layers {layers}, the weights beside it are {len(tensors)} tensors in all"
        )


def examine_config(folder: Path) -> dict:
    """Return the folder's config.json. Raises ValueError for a model that is not a causal language model."""
    hub.refuse_pointers(folder, ["config.json"])
    config = read_object(folder / "config.json")
    for name in OBJECTS:
        if os.path.lexists(folder / name):
            read_object(folder / name)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'} has no model_type, which says what kind of model this is: copy the file again")
    names = {one.name for one in folder.iterdir()}
    if beside := names.intersection(ADAPTER):
        raise ValueError(
            f"{folder} holds {_adapter(folder)} ({min(beside)}) beside a whole model: merge it ({MERGE}), or remove its files if the model "
            "is wanted without it"
        )
    if not dequantization(config) and (how := _quantization(config, names)):
        raise quantized(folder, how)
    if kind := _other_kind(config):
        raise ValueError(f"{folder} is {kind}, which this package does not train: name a causal language model")
    return config


def weight_files(folder: Path, config: dict) -> list[Path]:
    """Return the files from which transformers reads the weights. Raises ValueError or FileNotFoundError where they are not whole."""
    found = _weight_files(folder, config)
    for file in found:
        require_file(file)
    return found


def _weight_files(folder: Path, config: dict) -> list[Path]:
    """Return where the weights should be, by the names in the folder and the index."""
    names = {str(path.relative_to(folder)) for path in folder.iterdir()}
    choices = [name + ending for name in WEIGHTS for ending in ("", INDEX)]
    if own := config.get("transformers_weights"):
        choices = [f"{own} (transformers_weights in config.json)"] if str(own) not in names else [str(own)]
    if shards := sorted(name for name in names if re.fullmatch(r"shard-\d{5}-model-.*\.safetensors", name)):
        raise ValueError(f"{folder} holds a distributed save ({shards[0]}): save the model whole, with save_pretrained() on one device")
    if not (chosen := next((name for name in choices if name in names), None)):
        raise FileNotFoundError(_without_weights(folder, names, choices))
    if not chosen.endswith(INDEX):
        return [folder / chosen]
    index = read_object(folder / chosen)
    for key in ("weight_map", "metadata"):
        if not isinstance(index.get(key), dict):
            add = ', or add "metadata": {} to it' if key == "metadata" else ""
            raise ValueError(f'{folder / chosen} has no "{key}", which transformers reads: copy the file again{add}')
    files = sorted({str(file) for file in index["weight_map"].values()})
    if other := [file for file in files if file != Path(file).name or file in ("", "..")]:
        raise ValueError(f"{folder / chosen} names {shown(other[0])}, which is no file of its folder: copy the index again")
    if missing := [shown_name(file) for file in files if file not in names]:
        raise FileNotFoundError(
            f"{folder} is not whole: {chosen} names {len(files)} files, of which {len(missing)} are missing ({', '.join(missing[:3])}); "
            "copy them, too"
        )
    return [folder / file for file in files]


def read_headers(folder: Path, config: dict) -> dict[str, Tensor]:
    """Return what the folder's safetensors files say of each tensor, by its name; {} for pickles, which only torch can read."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, config):
        if file.suffix == ".safetensors":
            refuse_twice(file, tensors, header := read_header(file))
            tensors |= header
    return tensors


def refuse_twice(file: Path, before: Iterable[str], names: Iterable[str]) -> None:
    """Raise ValueError if a file holds a tensor that a file `before` it held, too: transformers takes one of the two."""
    if twice := sorted(set(before) & set(names)):
        raise ValueError(
            f"{file.parent} holds {len(twice)} tensors twice: {twice[0]} is in {file.name} and in a file before it, perhaps of another "
            "download or save. Download or save the model again, into an empty folder"
        )


def refuse_quantized(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Raise ValueError if these tensors are those of a quantized model, unless it is one that is multiplied out on loading."""
    method = dequantization(config)
    for name, tensor in tensors.items():
        is_weight = (method == "FP8" and tensor.dtype in FP8) or (method == "MXFP4" and name.endswith("_blocks"))
        scale = f"{name.removesuffix('_blocks')}_scales" if method == "MXFP4" else f"{name}_scale_inv"
        if is_weight and scale not in tensors:
            raise ValueError(f"{folder} is not whole: {name} is {method}, and {scale}, its scale, is missing: copy the files again")
        if is_weight and method == "FP8":
            _refuse_odd_blocks(folder, name, tensor, tensors[scale], config["quantization_config"].get("weight_block_size"))
        elif method and SCALES.search(name):
            continue
        elif QUANTIZED.search(name) or (name.endswith(".weight") and tensor.dtype not in FLOATS):
            raise quantized(folder, f"its weights hold {name}, {tensor.dtype}")


def _refuse_odd_blocks(folder: Path, name: str, weight: Tensor, scale: Tensor, block) -> None:
    """Raise ValueError for an FP8 weight whose blocks, of the size that config.json says, transformers would not multiply out.

    Transformers 5.23 divides a weight's rows and columns by those of its scales to find the size of a block, whatever config.json says:
    where the last block is smaller than the others, it multiplies by the wrong ones, or fails.
    """
    sizes, grid = weight.shape[-2:], scale.shape[-2:]
    if block is None and math.prod(grid) == 1:
        return  # one scale for the whole weight
    if not (isinstance(block, list) and len(block) == len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise ValueError(f"{folder}/config.json has weight_block_size {block!r}, and {name}_scale_inv is {list(grid)}: copy both again")
    if tuple(size / one for size, one in zip(sizes, block, strict=True)) != grid:
        how = f"{name}, of {list(sizes)} with {list(grid)} scales, is not of whole blocks of {block}, which transformers would take it for"
        raise quantized(folder, how)


def refuse_adapter_state(path, names: Iterable[str]) -> None:
    """Raise ValueError if the tensors of these names are a PEFT model's, with an adapter that is not merged."""
    if apart := sorted(name for name in names if ".base_layer." in name or ".lora_" in name):
        raise ValueError(
            f"{path} holds the state of a PEFT model whose LoRA adapter is not merged ({len(apart)} tensors such as {apart[0]}): merge it "
            f"({MERGE}), and name the result"
        )


def read_header(file: Path) -> dict[str, Tensor]:
    """Return what a safetensors file says of each tensor, by its name. Raises ValueError for one that is cut or damaged."""
    facts = file.stat()
    return _header(file, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=256)  # a start looks at a model several times
def _header(file: Path, size: int, changed: int) -> dict[str, Tensor]:
    """Return read_header's result for a file of `size` bytes that was last `changed` so many nanoseconds after 1970."""
    hub.refuse_pointers(file.parent, [file.name])
    with file.open("rb") as opened:
        begin = 8 + int.from_bytes(opened.read(8), "little")
        if begin > LONGEST_HEADER and begin <= size:
            raise ValueError(f"{file} is damaged, or no safetensors file: it claims a header of {begin - 8:,} bytes; copy it again")
        header = opened.read(begin - 8) if begin <= size else b""
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{file} ({size:,} bytes) is cut or damaged, or no safetensors file: copy it again") from error
    if end != size:
        raise ValueError(f"{file} is cut or damaged: its header tells of {end:,} bytes, the file has {size:,}; copy it again")
    return tensors


def _without_weights(folder: Path, names: set[str], choices: list[str]) -> str:
    """Return the message for a folder in which none of `choices` lies."""
    if gguf := sorted(name for name in names if name.lower().endswith(".gguf")):
        return f"{folder} holds GGUF weights only ({gguf[0]}), llama.cpp's form: name the Hugging Face folder that they were made from"
    loose = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth")))
    held = f"; it holds {', '.join(loose[:3])}, but no index that says which tensor is where: copy it, too" if loose else ""
    return f"{folder} has no weights: expected {' or '.join(choices)}{held}"


def dequantization(config: dict) -> str | None:
    """Return in what a config.json's model is quantized, one of DEQUANTIZED's values; None for another or none."""
    settings = config.get("quantization_config")
    return DEQUANTIZED.get(str(settings.get("quant_method"))) if isinstance(settings, dict) else None


def _quantization(config: dict, names: set[str]) -> str | None:
    """Return by what a model is quantized, with what says so; None for one of which nothing says that it is."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if (settings := part.get(key)) is not None:
                method = settings.get("quant_method") if isinstance(settings, dict) else None
                return f"by {method}, says {key} in config.json" if method else f"says {key} in config.json"
    return next((f"says {name}" for name in QUANTIZATION_FILES if name in names), None)


def quantized(folder: Path, how: str) -> ValueError:
    """Return the error that says how a model is quantized, and what to take instead."""
    return ValueError(
        f"{folder} is quantized ({how}), and quantized weights cannot be trained: take the bfloat16 or float16 model that it was made from"
    )


def _other_kind(config: dict) -> str | None:
    """Return what a model is that is not a causal language model of text; None for one that seems to be."""
    architectures = config.get("architectures")
    name = str(architectures[0] if isinstance(architectures, list) and architectures else config["model_type"])
    if any(config.get(key) for key in ("visual", "vision_tower", "mm_vision_tower")):
        return f"a vision-language model in its maker's own form ({name})"
    if config.get("audio_config"):
        return f"a model of speech and sound ({name})"
    if config.get("is_encoder_decoder"):
        return f"an encoder-decoder model ({name})"
    if OTHER_TASKS.search(name):
        return f"a model for another task ({name}: it has another head, such as score.weight, than a language model)"
    return None


def _adapter(folder: Path) -> str:
    """Return what kind of adapter a folder holds."""
    settings = read_object(folder / ADAPTER[0]) if (folder / ADAPTER[0]).is_file() else {}
    return f"a {settings.get('peft_type') or 'LoRA'} adapter".replace("LORA", "LoRA")
