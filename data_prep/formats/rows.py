"""Reads rows of local files and hub datasets, one at a time: no more than a row and a block of a file are in memory.

A row that cannot be decoded comes as a Refused and is counted; a file that is cut, damaged or of another kind raises a ValueError that
names the file and the line.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from posttrain.common import hub
from posttrain.common.errors import first_line, shown, shown_name
from posttrain.common.files import KeySetTwice, unique_keys
from posttrain.common.limits import memory_limit
from posttrain.data.parts import Refused

Row = dict | Refused
LONGEST_LINE = 2**26  # bytes of a row, or characters; one without an end, as a few packed bytes can hold, would take all memory
WHITESPACE = re.compile(r"[ \t\n\r]*")
BLOCK = 2**20  # bytes of a JSON list, or of a Parquet column, that are read at a time
LONGEST_SIGN = 16  # characters of what JSON reads at once, but texts and numbers: true, -Infinity, \\ud83d\\ude42
BATCH_ROWS, BATCH_MEMORY = 16, 2**32  # of a Parquet file, at a time; more rows are hardly faster, and a value may be there once for all
OTHER_KINDS = {
    b"\xff\xfe\0\0": "UTF-32; save it as UTF-8",
    b"\0\0\xfe\xff": "UTF-32; save it as UTF-8",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "gzipped; let its name end with .gz",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"\xfd7zX": "packed by xz; unpack it",
    b"BZh": "packed by bzip2; unpack it",
    b"PAR1": "Parquet; let its name end with .parquet",
}  # by how a file starts, the longer starts first


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


def open_text(path: Path) -> io.BufferedIOBase:
    """Open a file of text, unpacking it. Raises ValueError for one of another kind than its name says."""
    file = gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # noqa: SIM115
    start = file.peek(4)
    for magic, kind in OTHER_KINDS.items():
        if start.startswith(magic):
            file.close()
            raise ValueError(f"{path} is {kind} (it starts with {magic!r})")
    return file


def _too_long(path: Path, place: str) -> ValueError:
    return ValueError(f"{path}: {place} has more than {LONGEST_LINE >> 20} MB, which no row for training has")


def _json(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON list, or of a file with one in each line."""
    with open_text(path) as file:
        lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
        first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        while first and not first.strip():
            first = next(lines, b"")
        if first.lstrip().startswith(b"["):
            yield from _json_list(_ListText(path, first, file))
        else:
            yield from json_lines(path, itertools.chain([first], lines))


class _ListText:
    """The text of a JSON list, of which a row and what was read with it are in memory."""

    def __init__(self, path: Path, first: bytes, file: io.BufferedIOBase):
        self.path, self.first, self.file = path, first, file
        self.decoder, self.read = codecs.getincrementaldecoder("utf-8")(), 0  # how many bytes it has decoded
        self.text, self.line = "", 1  # what is not let go yet, and the number of the line in which it begins
        self.row, self.begin, self.at = 1, 0, 0  # the row's number, where it begins in the text, and how far it is read
        self.json = json.JSONDecoder(object_pairs_hook=unique_keys)

    def grow(self) -> bool:
        """Read as much again as there is of the row; return whether there was more. Raises ValueError for a row that is too long."""
        if len(self.text) - self.begin > LONGEST_LINE:
            raise _too_long(self.path, f"row {self.row}")
        block, self.first = self.first or self.file.read(max(BLOCK, len(self.text) - self.begin)), b""
        before = self.read - len(self.decoder.getstate()[0])
        self.read += len(block)
        try:
            more = self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 at byte {before + error.start}: save it as UTF-8") from None
        self.line += self.text.count("\n", 0, self.begin)
        self.text, self.at, self.begin = self.text[self.begin :] + more, self.at - self.begin, 0
        return bool(block)

    def sign(self) -> str:
        """Go to the next character that is not white space, and return it; an empty string at the end."""
        while True:
            self.at = WHITESPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """Read that character, after which the next row begins."""
        sign = self.sign()
        self.begin = self.at = self.at + len(sign)
        return sign

    def value(self):
        """Read a value. Raises ValueError where there is none."""
        self.sign()
        while True:
            try:
                value, self.at = self.json.raw_decode(self.text, self.at)
                return value
            except KeySetTwice as error:
                raise self.wrong(f"the key {error.key!r} is there twice") from None
            except json.JSONDecodeError as error:
                line = self.line + error.lineno - 1
                ends_within = error.msg.startswith("Unterminated string") or len(self.text) - error.pos < LONGEST_SIGN
                if not ends_within or not self.grow():
                    raise self.wrong(f"{error.msg} in line {line}") from None
            except (ValueError, RecursionError) as error:  # ValueError for a number of thousands of digits
                raise self.wrong(str(error)) from None

    def wrong(self, why: str) -> ValueError:
        """Return the error that says what is wrong with the row."""
        return ValueError(f"{self.path}: row {self.row} is not valid JSON: {why}")


def _json_list(text: _ListText) -> Iterator[Row]:
    """Yield the objects of a JSON list."""
    text.take()  # the opening bracket
    sign = text.take() if text.sign() == "]" else ","
    while sign == ",":
        yield _object(text.path, f"row {text.row}", text.value())
        if (sign := text.take()) == ",":
            text.row += 1
    if sign != "]":
        raise text.wrong("a comma should follow it" if sign else "the list does not end, so the file may be cut")
    if text.sign():
        raise ValueError(f"{text.path}: not valid JSON: something follows after the list's end")


def json_lines(path: Path, lines: Iterable[bytes], start: int = 1) -> Iterator[Row]:
    """Yield the objects of lines, of which the first has the number `start`. Raises ValueError."""
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        if len(line) > LONGEST_LINE:
            raise _too_long(path, f"line {number}")
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
    csv.field_size_limit(sys.maxsize)  # rows are bounded
    with open_text(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        size = 0  # of the row so far

        def lines() -> Iterator[str]:
            nonlocal size
            while line := text.readline(LONGEST_LINE + 1):
                size += len(line)
                if size > LONGEST_LINE:
                    raise _too_long(path, f"the row from line {reader.line_num + 1} on (is a quote not closed?)")
                yield line

        reader = csv.DictReader(itertools.dropwhile(lambda line: not line.strip(), lines()), strict=True)
        try:
            if reader.fieldnames and len(set(reader.fieldnames)) < len(reader.fieldnames):
                raise ValueError(f"{path}: two columns have the same name: {shown(reader.fieldnames)}")
            for row in reader:
                size = 0
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
    read = 0
    for batch in parquet_batches(path):
        yield from batch_rows(path, batch, read)
        read += len(batch)


def parquet_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of a Parquet file, BATCH_ROWS at a time. Raises ValueError."""
    if path.name.endswith(".gz"):
        raise ValueError(f"{path}: Parquet compresses its columns itself; unpack the file")
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two columns have the same name: {shown(names)}")
        batches = file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)
        while True:
            with memory_limit(BATCH_MEMORY):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch
    except MemoryError:  # pyarrow's is an ArrowException, too
        raise ValueError(f"{path}: {BATCH_ROWS} rows take more than {BATCH_MEMORY >> 30} GiB, which no rows for training do") from None
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read to its end, is it whole? ({type(error).__name__}: {error})") from error


def batch_rows(path: Path, batch: pyarrow.RecordBatch, read: int) -> Iterator[Row]:
    """Yield the rows of a Parquet file's batch, before which `read` rows are. Raises ValueError."""
    for part in _of_bounded_size(path, batch, read):
        yield from map(_without_padding, _python_rows(path, part))


def _of_bounded_size(path: Path, batch: pyarrow.RecordBatch, read: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield a batch, whose first row is number `read`, row by row where it is large. Raises ValueError for a row that is too long."""
    if batch.nbytes <= LONGEST_LINE and not any(pyarrow.types.is_dictionary(field.type) for field in batch.schema):
        yield batch
        return
    for number in range(len(batch)):
        row = batch.slice(number, 1)
        columns = [one.dictionary_decode() if isinstance(one, pyarrow.DictionaryArray) else one for one in row.columns]
        if sum(column.nbytes for column in columns) > LONGEST_LINE:
            raise _too_long(path, f"row {read + number + 1}")
        yield pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)


def _python_rows(path: Path, batch: pyarrow.RecordBatch) -> list[dict]:
    """The rows of a batch as Python values. Raises ValueError, which names the column, for a value that Python has not."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist()
            except (ValueError, OverflowError, LookupError) as error:
                why = f"{type(error).__name__}: {first_line(error)}"
                raise ValueError(
                    f"{path}: the column {shown_name(name)}, of the type {column.type}, has a value that cannot be read ({why}): mend it, "
                    "or leave the column out"
                ) from None
        raise


def _without_padding(row: dict) -> dict:
    """The row without nulls: Arrow gives all objects of a column the same keys, with nulls where a row had none."""

    def bare(value):
        if isinstance(value, dict):
            return {name: bare(inner) for name, inner in value.items() if inner is not None}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return {name: bare(value) for name, value in row.items()}
