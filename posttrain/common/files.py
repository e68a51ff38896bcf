"""Reads and writes small files: JSON lines, prompts, checksums, atomic writes, and flushing to disk."""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

REPOSITORY = Path(__file__).resolve().parents[2]


def read_json_lines(path: Path) -> list[dict]:
    """Reads a JSON Lines file; returns [] if there is no such file, and skips a last line without a line end (a crash cut it)."""
    if not path.exists():
        return []
    return [json.loads(line) for line in read_lines(path) if line.endswith("\n")]


def read_lines(path: Path) -> list[str]:
    """Reads a file's lines, with their line ends. str.splitlines would also split at U+2028 and the like, unescaped in JSON texts."""
    with path.open(encoding="utf-8") as file:
        return list(file)


def read_prompts(path: Path, most: int | None = None) -> list[str]:
    """Reads the first `most` prompts (None: all) of a text file with one prompt per line; blank lines are skipped.

    Raises FileNotFoundError if there is no such file, ValueError if it is not UTF-8 text or holds no prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected a text file with one prompt per line")
    try:
        lines = [line.strip() for line in read_lines(path) if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); expected one prompt per line") from error
    if not lines:
        raise ValueError(f"{path} holds no prompt; expected one per line")
    return lines[:most]


def file_facts(path: Path) -> dict:
    """Returns a file's size in bytes and its XXH3 checksum, as manifests record them."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "xxh3": hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text in UTF-8: a crash leaves the old one or the new one, and of several writers the last one wins."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file to write in a `with` block, at the end of which it appears at `path`; after an error nothing is left of it."""
    staging = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.incomplete")
    try:
        with staging.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    sync_folder(path.parent)


def refuse_existing(folder: Path, name: str) -> None:
    """Raises ValueError if `folder` already holds `name`: an earlier command's results are neither overwritten nor mixed with new ones."""
    if (folder / name).exists():
        raise ValueError(f"{folder} holds an earlier command's results ({name}); give another --output, or remove it")


def sync_files(folder: Path) -> None:
    """Flush every file of a folder, and of the folders in it, to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder (or a file) to disk: only then does a rename in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
