"""Reads rows of CSV and TSV."""

import csv
import io
import itertools
import re
import sys
from collections.abc import Iterator

from data_prep.formats import opening
from data_prep.formats.opening import File, Row, open_text, too_long
from posttrain.common.errors import shown
from posttrain.data.parts import Refused

NULLS = ("NaN", "nan", "None", "null", "NULL", "<NA>")  # what tables write for a field without a value; an empty field stays empty


def delimited_rows(file: File, delimiter: str | None) -> Iterator[Row]:
    """Yield the rows; without a delimiter, it is the comma, or what a header without a comma has: a semicolon or a tab.

    Raises ValueError for what is not valid.
    """
    csv.field_size_limit(sys.maxsize)  # rows are bounded
    with open_text(file) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        size, number, first = 0, 0, 1  # the size of the row so far, lines that were read, and the first one of the row

        def lines() -> Iterator[str]:
            nonlocal size, number
            while line := text.readline(opening.LONGEST_LINE + 1):
                size, number = size + len(line), number + 1
                if size > opening.LONGEST_LINE:
                    raise too_long(file, f"the row from line {first} on (is a quote not closed?)")
                yield line

        filled = itertools.dropwhile(lambda line: not line.strip(), lines())
        header = next(filled, "")
        if said := re.fullmatch(r'"?sep=(.)"?', header.strip("\r\n")):  # as Excel writes it
            delimiter, header = said[1], next(filled, "")
        reader = csv.DictReader(itertools.chain([header], filled), strict=True, delimiter=delimiter or _delimiter(header))
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if len(set(reader.fieldnames)) < len(reader.fieldnames):
                raise ValueError(f"{file}: two columns have the same name: {shown(reader.fieldnames)}")
            size, first = 0, number + 1
            for row in reader:
                size, first = 0, number + 1
                if None in row:
                    yield Refused("more fields than the header has columns")
                elif any(isinstance(value, str) and undecodable(value) for value in row.values()):
                    yield Refused("not UTF-8")
                else:
                    yield {name: None if value in NULLS else value for name, value in row.items()}
        except csv.Error as error:
            where = f"line {number}" if first >= number else f"the row of lines {first} to {number}"
            raise ValueError(f"{file}: {where} is not valid CSV: {error}") from None


def _delimiter(header: str) -> str:
    """Return what separates the names of a header: a comma, but where there is none a semicolon or a tab."""
    return next((sign for sign in ",;\t" if sign in header), ",")


def undecodable(text: str) -> bool:
    """Whether a text holds what surrogateescape puts in place of bytes that are not UTF-8."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)
