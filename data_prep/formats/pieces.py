"""Cuts files into pieces that are read elsewhere: lines of JSONL and batches of Parquet, which say by themselves what their rows are."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from data_prep.formats import opening
from data_prep.formats.arrow import parquet_batches, rows_of
from data_prep.formats.json_text import json_lines
from data_prep.formats.opening import File, Row, kind_of, open_text, refuse_pointer, told, unpacked_name

BOM = b"\xef\xbb\xbf"


class Lines(NamedTuple):
    """Lines of a JSONL file, of which the first has the number `start`."""

    path: File
    start: int
    lines: list[bytes]

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises ValueError."""
        return json_lines(self.path, self.lines, self.start)


class Batches(NamedTuple):
    """Batches of a Parquet file, as an Arrow stream; `read` rows of the file are before them."""

    path: File
    read: int
    stream: bytes

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises ValueError."""
        with pa.ipc.open_stream(self.stream) as batches:
            yield from rows_of(self.path, batches.schema, batches, self.read)


Piece = Lines | Batches


def pieces(path: File, rows: int, size: int) -> Iterator[tuple[int, int, Piece]] | None:
    """Cut a file into pieces of at most `rows` rows: (rows, bytes, piece); None for a file that has to be read in one go.

    A piece ends with the row by which it exceeds `size` bytes. Raises ValueError while it is read.
    """
    refuse_pointer(path)
    with told(path):
        cut = _cut(path, rows, size)
    return None if cut is None else _told(path, cut)


def _told(path: File, cut: Iterator[tuple[int, int, Piece]]) -> Iterator[tuple[int, int, Piece]]:
    with told(path):
        yield from cut


def _cut(path: File, rows: int, size: int) -> Iterator[tuple[int, int, Piece]] | None:
    if kind_of(path) == "parquet" and unpacked_name(path.name) == path.name:
        return _batches(path, rows, size)
    return _lines(path, rows, size) if _has_rows_as_lines(path) else None


def _has_rows_as_lines(path: File) -> bool:
    """Whether a file holds several lines, and the first two that are not empty begin as objects do, of which the first is whole."""
    if kind_of(path) != "json":
        return False
    found = []
    with open_text(path) as file:
        while len(found) < 2 and (line := file.readline(opening.LONGEST_LINE + 1)):
            if line.removeprefix(BOM).strip():
                found.append(line.removeprefix(BOM).strip())
    try:
        return len(found) == 2 and found[1].startswith(b"{") and isinstance(json.loads(found[0]), dict)
    except (ValueError, RecursionError):
        return False  # the reader will say what is wrong with it


def _lines(path: File, rows: int, size: int) -> Iterator[tuple[int, int, Lines]]:
    piece, count, held = Lines(path, 1, []), 0, 0
    with open_text(path) as file:
        number = 0
        while line := file.readline(opening.LONGEST_LINE + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if line.isspace():
                piece.lines.append(line)
                continue
            if count >= rows or held > size:
                yield count, held, piece
                piece, count, held = Lines(path, number, []), 0, 0
            piece.lines.append(line)
            count, held = count + 1, held + len(line)
    if count:
        yield count, held, piece


def _batches(path: File, rows: int, size: int) -> Iterator[tuple[int, int, Batches]]:
    taken: list[pa.RecordBatch] = []
    read = count = held = 0
    for batch in parquet_batches(path):
        while len(batch):
            part, batch = batch.slice(0, rows - count), batch.slice(rows - count)
            taken.append(part)
            count, held = count + len(part), held + part.nbytes
            if count >= rows or held > size:
                yield count, held, Batches(path, read, _stream(taken))
                taken, read, count, held = [], read + count, 0, 0
    if count:
        yield count, held, Batches(path, read, _stream(taken))


def _stream(batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
