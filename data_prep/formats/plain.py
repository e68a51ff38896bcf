"""Reads plain text: a row with the column `text` for each line, paragraph or file."""

import codecs
import json
from collections.abc import Iterator

from data_prep.formats import opening
from data_prep.formats.opening import File, Row, open_text, too_long
from posttrain.data.parts import Refused

UNITS = ("line", "paragraph", "file")


def text_rows(file: File, unit: str) -> Iterator[Row]:
    """Yield the texts of a file, `unit` being one of UNITS; what is empty is none. Raises ValueError for one that holds JSON."""
    with open_text(file) as opened:
        part, size, number = [], 0, 0
        for number, line in enumerate(iter(lambda: opened.readline(opening.LONGEST_LINE + 1), b""), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if _is_object(line):
                    raise ValueError(f"{file} holds JSON: let its name end with .jsonl (or .json)")
            if unit == "line" or (unit == "paragraph" and not line.strip()):
                yield from _row(part)
                part, size = [], 0
            part.append(line)
            size += len(line)
            if size > opening.LONGEST_LINE:
                raise too_long(file, f"the {unit} that ends in line {number}, or later,")
        yield from _row(part)


def _row(lines: list[bytes]) -> Iterator[Row]:
    """Yield a row of some lines, unless they are empty."""
    try:
        text = b"".join(lines).decode().strip("\r\n")
    except UnicodeDecodeError:
        yield Refused("not UTF-8")
        return
    if text.strip():
        yield {"text": text}


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
