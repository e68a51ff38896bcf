"""The manifest of prepared data: what lies in a folder, told without reading its rows or importing torch."""

from pathlib import Path

from posttrain.common.errors import nearest_path
from posttrain.common.files import read_object

FORMAT = 2
KINDS = ("sft", "dpo")
TEMPLATES = ("chatml", "tokenizer")  # chat formats: ChatML, or the tokenizer's own
ROWS = (".json", ".jsonl", ".csv", ".parquet")  # endings of files with rows that are not prepared yet; all but Parquet also with .gz


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
    if seen[0] != FORMAT or seen[1] not in KINDS:
        raise ValueError(f"{path} holds format {seen[0]}, {seen[1]} data; this code reads format {FORMAT}. Make it again with\n    {make}")
    if kind and seen[1] != kind:
        raise ValueError(f"{path} holds {seen[1]} data; this command needs {kind} data. Make it with\n    {make}")
    return manifest
