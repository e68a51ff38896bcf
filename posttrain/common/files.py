"""Files: small ones written whole, lines of JSON, prompts, checksums, and what must reach the disk before it counts."""

import hashlib
import json
import os
import socket
from pathlib import Path

import xxhash

REPOSITORY = Path(__file__).resolve().parents[2]


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


def file_facts(path: Path) -> dict:
    """Size and checksum of a file, as a manifest holds them."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "xxh3": hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, so that a crash leaves the old one or the new one, and of several that write at once the last one."""
    staging = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.incomplete")
    with staging.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)
    sync_folder(path.parent)


def refuse_existing(folder: Path, name: str) -> None:
    """Raises ValueError where an earlier command has left `name`: what it measured is neither overwritten nor mixed with something else."""
    if (folder / name).exists():
        raise ValueError(f"{folder} holds what an earlier command has measured ({name}); name another --output, or remove it")


def sync_files(folder: Path) -> None:
    """Flush the files and entries of a folder and of those in it."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: a rename is safe only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
