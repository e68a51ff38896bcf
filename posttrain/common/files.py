"""Reads and writes small files: JSON lines, prompts, checksums, atomic writes, and flushing to disk."""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
import yaml

from posttrain.common.errors import first_line, shown, shown_name

# endings of files with weights, which no tokenizer needs
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
INCOMPLETE = ".incomplete"  # ends the name of what is not whole yet
LONGEST_NUMBER = 10_000  # bits of a whole number in YAML; Python prints 4,300 digits, which have 14,000
LARGEST = 64 * 2**20  # bytes of a file that is read whole, and of a line of a log
LARGEST_YAML = 2**20  # bytes of a recipe; PyYAML reads about as many a second
REPOSITORY = Path(__file__).resolve().parents[2]


def read_whole(path: Path, most: int = LARGEST) -> str:
    """Reads a text file. Raises FileNotFoundError if there is none; ValueError, naming it, if it is no regular file or not UTF-8.

    Also for one of over `most` bytes: what is read whole is small, and a sparse file may claim any size.
    """
    return "".join(read_lines(path, most))


def read_lines(path: Path, most: int = LARGEST) -> list[str]:
    """Reads a text file's lines, with their line ends. str.splitlines would also split at U+2028 and the like, unescaped in JSON texts.

    A byte order mark at the beginning, which some editors write, is left out. Raises as `read_whole` does.
    """
    require_file(path)
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes, and should have at most {most:,}: it is damaged, or another file than is expected")
    return list(_texts(path))


def lines_of(path: Path) -> Iterator[bytes]:
    """Yields a file's lines, with their line ends. Raises as `read_whole` does, for a line of over LARGEST bytes instead of a file."""
    require_file(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LARGEST + 1):
            number += 1
            if len(line) > LARGEST:
                raise ValueError(f"{path}:{number} is longer than {LARGEST:,} bytes, which no command writes: restore the file from a copy")
            yield line


def _texts(path: Path) -> Iterator[str]:
    """Yields the texts of `lines_of`. Raises ValueError if one is not UTF-8."""
    for number, line in enumerate(lines_of(path), 1):
        try:
            yield line.decode("utf-8" if number > 1 else "utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number} is not UTF-8 text, at byte {error.start} of the line") from error


def require_file(path: Path) -> None:
    """Raises FileNotFoundError unless `path` is there, and ValueError unless it is a regular file: reading a pipe would wait for ever."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link that leads nowhere")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file that can be read: it is a folder, a pipe or a device")


def read_object(path: Path, most: int = LARGEST) -> dict:
    """Reads a JSON object, or of a file named *.yaml a YAML mapping. Raises as `read_whole` does, and ValueError if it is damaged."""
    text = read_whole(path, LARGEST_YAML if path.suffix == ".yaml" else most)
    try:
        return _object(yaml.load(text, UniqueKeys) if path.suffix == ".yaml" else json.loads(text, object_pairs_hook=unique_keys))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        why = "it is empty" if not text.strip() else "it holds zero bytes" if "\0" in text else first_line(error)
        raise ValueError(f"{path} is damaged: {why}") from error


def read_json_lines(path: Path, check: Callable[[dict], None] | None = None) -> list[dict]:
    """Reads a JSON Lines file; returns [] if there is no such file, and skips a last line without a line end (a crash cut it).

    `check` raises ValueError for an object that is not as it should be. Raises as `read_lines` does, and ValueError for a damaged line.
    """
    if not path.exists() and not path.is_symlink():
        return []
    records = []
    for number, line in enumerate(_texts(path), 1):  # a log may be of any size
        if line.endswith("\n"):
            try:
                records.append(parse_line(line, check))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is damaged: {error}. Restore the file, or remove this line") from error
    return records


def parse_line(line: str | bytes, check: Callable[[dict], None] | None = None) -> dict:
    """Returns a JSON line's object. Raises ValueError, which says what is wrong with it; `check` as for `read_json_lines`."""
    try:
        record = _object(json.loads(line))
    except (ValueError, RecursionError) as error:  # of bytes also those that are not UTF-8
        raise ValueError(f"it is no JSON object ({first_line(error)})") from error
    if check:
        check(record)
    return record


class UniqueKeys(yaml.SafeLoader):
    """Reads YAML of somebody else's: every mistake in it is a yaml.YAMLError.

    A key that is set twice is refused, of which PyYAML would silently keep the last. So are aliases, of which ten lines make as many
    values as memory holds, and whole numbers that Python cannot print.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self.keys: dict[int, str] = {}  # of a mapping's value, by the id of its node

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} has an alias (*name); write the value itself")
        return super().compose_node(parent, index)

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
                raise ValueError("it has too many digits")
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # by what stands where a number should be
            key = f"{self.keys[id(node)]}: " if id(node) in self.keys else ""
            kind = node.tag.rpartition(":")[2]
            where = f"{shown(node.value)} in line {node.start_mark.line + 1}" if isinstance(node, yaml.ScalarNode) else "a value"
            raise yaml.YAMLError(f"{key}{where} is no {kind}, as which YAML reads it ({first_line(error)})") from error
        return value

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in seen:
                raise yaml.YAMLError(f"{shown_name(name)} is set twice")
            seen |= {name} if isinstance(name, Hashable) else set()
            self.keys[id(value)] = shown_name(name)
        return super().construct_mapping(node, deep)


class KeySetTwice(ValueError):
    """Says which key of an object is there twice."""

    def __init__(self, key: str):
        super().__init__(f"{shown_name(key)} is set twice")
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """Returns a JSON object's values by key, as json's object_pairs_hook. Raises KeySetTwice, where json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeySetTwice(next(name for name in found if names.count(name) > 1))
    return found


def _object(value) -> dict:
    """Returns `value`. Raises ValueError if it is something else than a mapping whose keys are texts."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"it holds a value of type {type(value).__name__} where keys with their values should be")
    return value


def read_prompts(path: Path, most: int | None = None) -> list[str]:
    """Reads the first `most` prompts (None: all) of a text file with one prompt per line; blank lines are skipped.

    Raises FileNotFoundError if there is no such file, ValueError if it is not UTF-8 text or holds no prompt.
    """
    try:
        lines = [line.strip() for line in read_lines(path) if line.strip()]
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}; expected a text file with one prompt per line") from error
    if not lines:
        raise ValueError(f"{path} holds no prompt; expected one per line")
    return lines[:most]


def file_facts(path: Path) -> dict:
    """Returns a file's size in bytes and its XXH3 checksum, as manifests record them."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "xxh3": hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}


def checksum(values: dict) -> str:
    """Returns the XXH3 checksum of a JSON object, the same however it is written; files keep it under "checksum", beside what it is of."""
    return xxhash.xxh3_128_hexdigest(json.dumps(json.loads(json.dumps(values)), sort_keys=True).encode())


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text in UTF-8: a crash leaves the old one or the new one, and of several writers the last one wins."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file to write in a `with` block, at the end of which it appears at `path`; after an error nothing is left of it."""
    staging = staging_name(path)
    with naming(path):
        try:
            with staging.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a system error of the block, such as that of a full disk, name the file that was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def staging_name(path: Path) -> Path:
    """Return where this process writes what is to appear at `path`: a name that nobody gives to something of their own."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{INCOMPLETE}")


def sweep(folder: Path, of: str = "") -> None:
    """Remove what a process that was killed left half-written in `folder`, unless a process of this host is writing it just now.

    Only names of `staging_name`'s form (`of`: for that file or folder), of checkpoints, and of a final/ of versions before 0.2 are taken.
    """
    form = rf"{re.escape(of) or '.+'}\.[\w.-]+\.(?P<writer>\d+)" + ("" if of else r"|step_\d{6,}|final")
    for path in folder.glob(f"{glob.escape(of)}*{INCOMPLETE}"):
        if not (found := re.fullmatch(f"({form}){re.escape(INCOMPLETE)}", path.name)):
            continue
        is_of_here = path.name.endswith(f".{socket.gethostname()}.{found['writer']}{INCOMPLETE}")
        if is_of_here and int(found["writer"]) != os.getpid() and os.path.exists(f"/proc/{found['writer']}"):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


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
