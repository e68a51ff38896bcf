"""Runs the code that comes with a model, of a type that transformers does not know, where trust_remote_code says that it may.

Nothing else runs such code: once its classes are registered, the model is opened, compared and trained as any other.
"""

import contextlib
import hashlib
import importlib
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from posttrain.common import hub
from posttrain.common.errors import reason
from posttrain.common.files import read_object
from posttrain.engine import checkpoint_folder

CONFIG, MODEL = "AutoConfig", "AutoModelForCausalLM"  # keys of auto_map
PACKAGE = "posttrain_own_code_"  # how the package's name begins as which a folder's code is imported


def register(path: str) -> str | None:
    """Import the code of a model's folder, hub name or checkpoint, and tell transformers of its classes.

    Returns what runs, for the first screen; None for a model without such code, or of a type that transformers knows.
    Raises ValueError where the code cannot be imported, or has no causal language model.
    """
    place = Path(hub.snapshot_in(path))
    if hub.is_hub_name(path):
        place = Path(snapshot_download(path, allow_patterns=["*.py", "config.json"], local_files_only=not hub.is_reachable()))
    elif checkpoint_folder.is_checkpoint(place):
        place = checkpoint_folder.model_description(place)
    config = read_object(place / "config.json") if (place / "config.json").is_file() else {}
    kind, names = config.get("model_type"), config.get("auto_map")
    if not isinstance(kind, str) or not isinstance(names, dict) or (kind in CONFIG_MAPPING and not _is_ours(CONFIG_MAPPING[kind])):
        return None
    if lacking := [name for name in (CONFIG, MODEL) if not isinstance(names.get(name), str)]:
        raise ValueError(f"{path} comes with code, but its auto_map in config.json names no {' and no '.join(lacking)}")
    try:
        described, model = (_named(place, names[name]) for name in (CONFIG, MODEL))
        if not issubclass(described, PreTrainedConfig) or not issubclass(model, PreTrainedModel) or described.model_type != kind:
            raise TypeError(f"{names[CONFIG]} and {names[MODEL]} are no config of type {kind!r} and model of transformers")
    except Exception as error:  # of any kind: it is somebody's code
        raise ValueError(f"the code that comes with {path} cannot be run: {reason(error)}") from error
    model.config_class = described
    AutoConfig.register(kind, described, exist_ok=True)
    AutoModelForCausalLM.register(described, model, exist_ok=True)
    files = sorted(place.glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{', '.join(file.name for file in files)} of {place} (sha256 {digest[:16]}), as trust_remote_code says: {model.__name__}"


def write(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Copy the code that computes a model into a folder; return the auto_map that names it there, empty for transformers' own models."""
    if not _is_ours(type(model)):
        return {}
    for file in Path(sys.modules[type(model).__module__.partition(".")[0]].__path__[0]).glob("*.py"):
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)
    named = {CONFIG: type(model.config), MODEL: type(model)}
    return {name: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for name, kind in named.items()}


def _is_ours(kind: type) -> bool:
    """Whether a class is one that register has imported."""
    return kind.__module__.startswith(PACKAGE)


def _named(folder: Path, reference: str) -> type:
    """Return the class that auto_map names as FILE.CLASS. Raises whatever its code raises, and ValueError for code of another place."""
    file, _, name = reference.rpartition(".")
    if not file.isidentifier():
        raise ValueError(f"auto_map names {reference}, which is no class in a file of its folder")
    package = PACKAGE + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    with _without_bytecode():
        return getattr(importlib.import_module(f"{package}.{file}"), name)


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    """Let Python write no __pycache__ into a model's folder."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
