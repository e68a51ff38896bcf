"""Files that hold something in every line: records of a run, which grow while it goes on, and prompts."""

import json
from pathlib import Path


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file with one in each line; none where there is no file. A last line that is not whole is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in read_lines(path) if line.endswith("\n")]


def read_lines(path: Path) -> list[str]:
    """A file's lines with their ends. str.splitlines would also cut at U+2028 and its like, which texts inside JSON hold as they are."""
    with path.open(encoding="utf-8") as file:
        return list(file)


def read_prompts(path: Path, most: int | None = None) -> list[str]:
    """The first `most` prompts of a text file with one in each line; blank lines are none.

    Raises FileNotFoundError, and ValueError for a file that is no text or holds no prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; it holds a prompt a line")
    try:
        lines = [line.strip() for line in read_lines(path) if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start}); expected a prompt a line") from error
    if not lines:
        raise ValueError(f"{path} holds no prompt; expected one a line")
    return lines[:most]
