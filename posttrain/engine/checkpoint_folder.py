"""Reads a checkpoint's folder: tells whether it is one and whether it is damaged, and reads its manifest."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from posttrain.common import files
from posttrain.common.errors import shown, shown_name
from posttrain.common.records import Record, check_record

NAME = re.compile(r"step_\d{6,}")
FORMAT = 1
LARGEST = 2**29  # bytes of a manifest, which has about 70 for each part of a parameter on each rank
BUFFERS = "buffers.pt"  # a checkpoint's file with the model's persistent buffers, where it has any
Count = Annotated[int, Field(ge=0, lt=2**48)]


class _File(Record):
    """Size and checksum of a file."""

    size: Count
    xxh3: str


class _Guard(Record):
    """What StepGuard keeps."""

    norms: list[float]
    highest: float = 0.0
    last_applied: Count
    bad_in_a_row: Count


class _State(Record):
    """Where every parameter lies, as shards.Saved reads it: of each rank the fragments (name, start, length, group, offset)."""

    zero_stage: Literal[0, 1, 2, 3]
    optimizer_step: Count
    shapes: dict[str, list[Count]]
    files: list[str]
    fragments: list[list[Annotated[tuple[str, Count, Count, Count, Count], Field(strict=False)]]]
    has_buffers: bool = False


class _Recipe(Record):
    """The run's recipe, as far as a model is made by it."""

    dtype: Literal["float32", "bfloat16", "float16"]


class _Manifest(Record):
    """manifest.json."""

    step: Count
    validation: float | None
    guard: _Guard
    world_size: Annotated[int, Field(ge=1)]
    state: _State
    files: dict[str, _File]
    recipe: _Recipe = Field(_Recipe(dtype="float32"))


def is_checkpoint(path: Path) -> bool:
    """Whether a folder, or what a link leads to, is named and laid out as one of a run's checkpoints."""
    return bool(NAME.fullmatch(path.resolve().name)) and (path / "manifest.json").is_file()


def model_description(path: Path) -> Path:
    """Returns the folder that describes the model of RUN/checkpoints/step_*: RUN/model."""
    return path.resolve().parent.parent / "model"


def read_manifest(path: Path) -> dict:
    """Reads a checkpoint's manifest. Raises ValueError if it is missing, damaged, of another format, or names a file outside the folder."""
    try:
        manifest = files.read_object(path / "manifest.json", LARGEST)
        checksum = manifest.pop("checksum")
    except FileNotFoundError:
        raise ValueError("it has no manifest.json") from None
    except (ValueError, KeyError, OSError):
        raise ValueError("manifest.json is not readable") from None
    if checksum != files.checksum(manifest):
        raise ValueError("manifest.json is not what was written")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"it has format {shown(manifest.get('format'))}, this code reads {FORMAT}")
    try:
        check_record(manifest, _Manifest)
    except ValueError as error:
        raise ValueError(f"manifest.json is damaged: {error}") from None
    for name in [*manifest["files"], *manifest["state"]["files"]]:
        if name != Path(name).name or name in ("", "..") or (path / name).is_symlink():
            raise ValueError(f"manifest.json names {shown(name)}, which is not a file in this folder")
    needed = [*manifest["state"]["files"], *([BUFFERS] if manifest["state"].get("has_buffers") else [])]
    if lacking := [name for name in needed if name not in manifest["files"]]:
        raise ValueError(f"manifest.json is damaged: it has no size and checksum of {shown_name(lacking[0])}")
    return manifest


def file_problem(path: Path, name: str, facts: dict) -> str | None:
    """Returns what is wrong with file `name` of a checkpoint; None if it has the size and checksum of `facts`, its manifest entry."""
    if not (path / name).is_file():
        return f"{name} is missing"
    if (size := (path / name).stat().st_size) != facts["size"]:
        return f"{name} has {size} bytes, {facts['size']} were written"
    if files.file_facts(path / name) != facts:
        return f"{name} is not what was written (its checksum differs)"
    return None


def problem(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint; None if its manifest can be read and every file has its size and checksum."""
    try:
        facts = read_manifest(path)
    except ValueError as error:
        return str(error)
    return next((found for name, file in facts["files"].items() if (found := file_problem(path, name, file))), None)


def saved_checkpoints(folder: Path) -> list[Path]:
    """Lists the finished checkpoints in a folder, going by their names, oldest first."""
    return sorted((path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), key=step_of) if folder.is_dir() else []


def step_of(path: Path) -> int:
    """Returns the step of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step_"))
