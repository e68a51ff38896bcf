"""Reads rows of files, one at a time: no more than a row and a block of a file are in memory.

A row that cannot be decoded comes as a Refused and is counted; a file that is cut, damaged or of another kind raises a ValueError that
names the file and the line.
"""

from collections.abc import Iterator

from data_prep.formats.arrow import arrow_rows, parquet_rows
from data_prep.formats.delimited import delimited_rows
from data_prep.formats.json_text import json_rows
from data_prep.formats.opening import BINARY, File, Row, advice, kind_of, refuse_pointer, told, unpacked_name
from data_prep.formats.plain import text_rows

__all__ = ["Row", "file_rows"]


def file_rows(file: File, txt: str = "line") -> Iterator[Row]:
    """Yield the rows of a file, by its name; `txt` says what is a row of plain text, one of plain.UNITS. Raises ValueError."""
    refuse_pointer(file)
    kind = kind_of(file)
    if kind in BINARY and unpacked_name(file.name) != file.name:
        raise ValueError(f"{file}: {kind.capitalize()} packs its columns itself; unpack the file")
    readers = {
        "json": json_rows,
        "csv": lambda file: delimited_rows(file, None),
        "tsv": lambda file: delimited_rows(file, "\t"),
        "txt": lambda file: text_rows(file, txt),
        "parquet": parquet_rows,
        "arrow": arrow_rows,
    }
    if kind not in readers:
        raise ValueError(f"{file} {advice(file)}")
    with told(file):
        yield from readers[kind](file)
