"""Reads rows of local files and hub datasets, one at a time: no more than one block of a file is in memory, except of JSON lists.

A row that cannot be decoded comes as a Refused and is counted; a file that is cut, damaged or of another kind raises a ValueError that
names the file and the line.
"""

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from posttrain.common import hub
from posttrain.common.files import KeySetTwice, unique_keys
from posttrain.data.parts import Refused

Row = dict | Refused
LONGEST_LINE = 2**26  # bytes of a row; a line without an end, as a few packed bytes can hold, would take all memory


def file_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON, JSONL, CSV or Parquet file, by its name; all but Parquet may be gzipped. Raises ValueError."""
    name = path.name.removesuffix(".gz")
    reader = _parquet if name.endswith(".parquet") else _csv if name.endswith(".csv") else _json
    try:
        yield from reader(path)
    except (EOFError, zlib.error, OSError) as error:  # pyarrow's errors are OSErrors or ValueErrors
        raise ValueError(f"{path} cannot be read to its end, is it whole? ({type(error).__name__}: {error})") from error


def hub_rows(name: str, split: str, revision: str | None) -> Iterator[Row]:
    """Yield the rows of a hub dataset, from the local cache where the hub cannot be reached. Raises ValueError."""
    import datasets
    import huggingface_hub

    if not hub.is_reachable():  # go to the local cache at once: the libraries would try for half a minute first
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = "the hub" if hub.is_reachable() else "the local cache, and the hub cannot be reached"
        raise ValueError(
            f"{name} ({split}) cannot be loaded from {where}: {error}\nWhere the hub is out of reach, give the same rows with "
            f"--source FILE_OR_DIR; a private dataset needs HF_TOKEN in the environment"
        ) from error
    yield from map(_without_padding, rows)


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def _json(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON list, or of a file with one in each line."""
    with _open(path) as file:
        if (start := file.peek(2)[:2]) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path} is UTF-16 (it starts with {start!r}); save it as UTF-8")
        lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
        first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        while first and not first.strip():
            first = next(lines, b"")
        if first.lstrip().startswith(b"["):
            try:
                yield from _json_list(path, first + file.read())
            except MemoryError:
                raise ValueError(f"{path} is a JSON list that does not fit into memory: save it as JSONL, a row a line") from None
        else:
            yield from _json_lines(path, itertools.chain([first], lines))


def _json_list(path: Path, content: bytes) -> Iterator[Row]:
    try:
        rows = json.loads(content, object_pairs_hook=unique_keys)
    except KeySetTwice as error:
        raise ValueError(f"{path}: not valid JSON: the key {error.key!r} is there twice") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        yield _object(path, f"row {number}", row)


def _json_lines(path: Path, lines: Iterator[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{path}: line {number} has more than {LONGEST_LINE >> 20} MB, which no row for training has")
        try:
            text = line.decode()
        except UnicodeDecodeError:
            yield Refused("not UTF-8")
            continue
        try:
            row = json.loads(text, object_pairs_hook=unique_keys)
        except KeySetTwice as error:
            yield Refused(f"the key {error.key!r} is there twice")
            continue
        except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
            cut = "; it has no line end, so the file may be cut" if not line.endswith(b"\n") else ""
            raise ValueError(f"{path}: line {number} is not valid JSON: {error}{cut}") from None
        yield _object(path, f"line {number}", row)


def _object(path: Path, place: str, row) -> dict:
    """The row, if it is an object; else raises ValueError with its place."""
    if not isinstance(row, dict):
        raise ValueError(f"{path}: {place} is a {type(row).__name__}; expected an object with named columns")
    return row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with _open(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = itertools.dropwhile(lambda line: not line.strip(), text)
        reader = csv.DictReader(lines, strict=True)
        try:
            if reader.fieldnames and len(set(reader.fieldnames)) < len(reader.fieldnames):
                raise ValueError(f"{path}: two columns have the same name: {reader.fieldnames}")
            for row in reader:
                if None in row:
                    yield Refused("more fields than the header has columns")
                elif any(isinstance(value, str) and _undecodable(value) for value in row.values()):
                    yield Refused("not UTF-8")
                else:
                    yield row
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num} is not valid CSV: {error}") from None


def _undecodable(text: str) -> bool:
    """Whether a text holds what surrogateescape puts in place of bytes that are not UTF-8."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def _parquet(path: Path) -> Iterator[Row]:
    if path.name.endswith(".gz"):
        raise ValueError(f"{path}: Parquet compresses its columns itself; unpack the file")
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from map(_without_padding, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read to its end, is it whole? ({type(error).__name__}: {error})") from error


def _without_padding(row: dict) -> dict:
    """The row without nulls: Arrow gives all objects of a column the same keys, with nulls where a row had none."""

    def bare(value):
        if isinstance(value, dict):
            return {name: bare(inner) for name, inner in value.items() if inner is not None}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return {name: bare(value) for name, value in row.items()}
