"""The manifest of prepared data: what lies in a folder, told without reading its rows or importing torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from posttrain.common.errors import nearest_path
from posttrain.common.files import checksum, read_object
from posttrain.common.places import command
from posttrain.common.records import Record, check_record

FORMAT = 2
KINDS = ("sft", "dpo")
TEMPLATES = ("chatml", "tokenizer")  # chat formats: ChatML, or the tokenizer's own
ROWS = (".json", ".jsonl", ".csv", ".parquet")  # endings of files with rows that are not prepared yet; all but Parquet also with .gz


class _File(Record):
    """A file of prepared data."""

    bytes: int
    sha256: str


class _Options(Record):
    """What the data was prepared with, as far as it is used again."""

    dataset: list[str] | None = None
    source: str | None = None
    tokenizer: str = ""
    template: str = TEMPLATES[0]
    system_prompt: str | None = None


class _Manifest(Record):
    """manifest.json, as far as training reads it."""

    tokenizer: str
    template: str
    template_name: Literal[*TEMPLATES]  # ty: ignore[invalid-type-form]
    options: _Options
    counts: dict[str, Annotated[int, Field(ge=0)]]
    files: dict[str, _File]


def is_raw(path: Path) -> bool:
    """Whether a path is a file of rows that are not prepared yet, or a folder of such files."""
    if path.is_dir() and not (path / "manifest.json").exists():
        return any(_has_rows(one) for one in path.iterdir())
    return path.is_file() and _has_rows(path)


def _has_rows(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(ROWS)


def read_manifest(directory: str, make: str, kind: str | None = None) -> dict:
    """The manifest of prepared data, of one kind or (None) of any.

    Raises FileNotFoundError or ValueError, naming the command `make`, where the folder is missing, half-written, of another format or
    kind, or where it holds rows that are not prepared.
    """
    path = Path(directory)
    if is_raw(path):
        raise ValueError(f"{path} holds rows that are not prepared yet. Prepare them, and name the folder that this makes:\n    {make}")
    if path.is_file():
        raise ValueError(f"{path} is a file; prepared data is a folder, which data_prep makes from rows ({', '.join(ROWS)}, also with .gz)")
    if not path.is_dir():
        raise FileNotFoundError(f"there is no prepared data at {path}.{nearest_path(directory)} Make it with\n    {make}")
    if not (path / "manifest.json").is_file():
        raise ValueError(f"{path} has no manifest.json: it was not prepared, or not to the end. Make it again with\n    {make}")
    try:
        manifest = read_object(path / "manifest.json")
        seen = manifest["format"], manifest["kind"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). Make it again with\n    {make}") from error
    make_again = again(manifest, f"{directory}_again") or make
    if seen[0] != FORMAT or seen[1] not in KINDS:
        raise ValueError(f"{path} holds format {seen[0]}, {seen[1]} data; this code reads format {FORMAT}. Make it again with\n    {make}")
    if kind and seen[1] != kind:
        raise ValueError(f"{path} holds {seen[1]} data; this command needs {kind} data. Make it with\n    {make}")
    try:
        check_record(manifest, _Manifest)
        if manifest.pop("checksum", None) not in (None, checksum(manifest)):  # versions before 0.2 wrote none
            raise ValueError("it is not what was written (its checksum differs)")
    except ValueError as error:
        raise ValueError(f"{path / 'manifest.json'} is damaged: {error}. Make the data again with\n    {make_again}") from error
    return manifest


def again(manifest: dict, output_dir: str, tokenizer: str | None = None) -> str | None:
    """Return the command that prepares the same rows into another folder, with this tokenizer or the same; None where it is not known."""
    options = manifest.get("options")
    if not isinstance(options, dict) or not isinstance(options.get("dataset") or [], list) or manifest["kind"] not in KINDS:
        return None
    words = [word for name in options.get("dataset") or [] for word in ("--dataset", name)]
    words += ["--source", options["source"]] if options.get("source") else []
    if not words:
        return None
    words += ["--tokenizer", tokenizer or options.get("tokenizer") or "TOKENIZER", "--template", options.get("template", TEMPLATES[0])]
    return command(f"prepare-{manifest['kind']}", *words, "--output_dir", output_dir)


def unused_columns(manifest: dict) -> list[str]:
    """Return a sentence about columns of the rows that nothing was made of, in a list that is empty without any."""
    unused = manifest.get("unused") or {}
    found = ", ".join(f"{name} ({'1 row' if count == 1 else f'{count:,} rows'})" for name, count in unused.items())
    return [f"columns not used: {found}"] if found else []
