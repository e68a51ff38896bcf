"""Reads rows of JSON: a list, an object in each line, objects over several lines, or one object that wraps the rows."""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator

from data_prep.formats import opening
from data_prep.formats.opening import File, Row, open_text, too_long, unpacked_name
from posttrain.common.errors import shown
from posttrain.common.files import KeySetTwice, unique_keys
from posttrain.data.parts import Refused

DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
WHITESPACE = re.compile(r"[ \t\n\r]*")
LONGEST_SIGN = 16  # characters of what JSON reads at once, but texts and numbers: true, -Infinity, \\ud83d\\ude42
# keys under which the only object of a file may hold the rows; those of splits too
WRAPPERS = {"data", "rows", "examples", "instances", "items", "samples", "records", "entries", "dataset", "results"}
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
PEEKED = 4096  # bytes in which such a key is looked for
WRAPPED = re.compile(  # the key comes first, and no message
    rf"""\s*\{{\s*"({"|".join(WRAPPERS | SPLITS)})"\s*:\s*\[\s*\{{\s*"(?!(role|from|content|value)")""".encode(), re.IGNORECASE
)
AROUND = ("system", "tools", "instruction", "prompt")  # what stands beside the rows and is meant for each of them
AS_ROWS = "write a list of objects, or JSONL (pandas: to_json(FILE, orient='records', lines=True))"


def json_rows(file: File) -> Iterator[Row]:
    """Yield the objects of a file. Raises ValueError for what is no JSON, or none that holds rows."""
    with open_text(file) as opened:
        lines = iter(lambda: opened.readline(opening.LONGEST_LINE + 1), b"")
        first, skipped = next(lines, b"").removeprefix(codecs.BOM_UTF8), 0
        while first and not first.strip():
            first, skipped = next(lines, b""), skipped + 1
        if first.lstrip().startswith(b"["):
            yield from _list(_Text(file, first, opened, skipped + 1))
            return
        goes_on = len(first) > opening.LONGEST_LINE or _goes_on(first)
        if goes_on and WRAPPED.match(first[:PEEKED] + opened.peek(PEEKED)[:PEEKED]):
            yield from _wrapped(_Text(file, first, opened, skipped + 1))
            return
        if goes_on and len(first) <= opening.LONGEST_LINE:
            rows = _objects(_Text(file, first, opened, skipped + 1))
        else:
            rows = json_lines(file, itertools.chain([first], lines), skipped + 1)
        alone = list(itertools.islice(rows, 2))
        yield from _unwrapped(file, alone[0]) if len(alone) == 1 and isinstance(alone[0], dict) else alone
        yield from rows


def _goes_on(line: bytes) -> bool:
    """Whether an object begins in a line and does not end in it, or another begins there."""
    text = line.decode(errors="replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        return text.lstrip().startswith("{") and (not rest or (error.msg == "Extra data" and rest.startswith("{")))
    except (ValueError, RecursionError):
        pass
    return False


class _Text:
    """A text of JSON values, of which a row and what was read with it are in memory."""

    def __init__(self, file: File, first: bytes, opened: io.BufferedIOBase, line: int):
        self.path, self.first, self.file = file, first, opened
        self.decoder, self.read = codecs.getincrementaldecoder("utf-8")(), 0  # how many bytes it has decoded
        self.text, self.line = "", line  # what is not let go yet, and the number of the line in which it begins
        self.row, self.begin, self.at = 1, 0, 0  # the row's number, where it begins in the text, and how far it is read

    def grow(self) -> bool:
        """Read as much again as there is of the row; return whether there was more. Raises ValueError for a row that is too long."""
        if len(self.text) - self.begin > opening.LONGEST_LINE:
            raise too_long(self.path, f"row {self.row}")
        block, self.first = self.first or self.file.read(max(opening.BLOCK, len(self.text) - self.begin)), b""
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
                value, self.at = DECODER.raw_decode(self.text, self.at)
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


def _list(text: _Text) -> Iterator[Row]:
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
        raise ValueError(
            f"{text.path}: not valid JSON: something follows after the list's end (is each line a list of messages? "
            'Write an object in each, {"messages": [...]})'
        )


def _wrapped(text: _Text) -> Iterator[Row]:
    """Yield the objects of a list that is the first value of an object, which may be long. Raises ValueError as _unwrapped does."""
    text.take()
    name, _ = text.value(), text.take()
    text.take()  # the opening bracket
    sign = ","
    while sign == ",":
        yield _object(text.path, f"row {text.row}", text.value())
        if (sign := text.take()) == ",":
            text.row += 1
    around = {name: []}
    while sign == "]" and (sign := text.take()) == ",":
        key, _, sign = text.value(), text.take(), "]"
        around[key] = text.value()
        text.begin = text.at
    if sign != "}" or text.sign():
        raise text.wrong("a comma should follow it, or the list's end and the object's; the file may be cut")
    _refuse_lost(text.path, name, around)


def _objects(text: _Text) -> Iterator[Row]:
    """Yield objects that stand one after another, each over several lines."""
    while sign := text.sign():
        if sign == "," and text.row > 1:
            raise ValueError(f"{text.path}: a comma follows row {text.row - 1}, but the file is no list: put [ and ] around it")
        yield _object(text.path, f"row {text.row}", text.value())
        text.begin, text.row = text.at, text.row + 1


def json_lines(file: File, lines: Iterable[bytes], start: int) -> Iterator[Row]:
    """Yield the objects of lines, of which the first has the number `start`. Raises ValueError."""
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        if len(line) > opening.LONGEST_LINE:
            raise too_long(file, f"line {number}")
        try:
            text = line.decode()
        except UnicodeDecodeError:
            yield Refused("not UTF-8")
            continue
        try:
            row = DECODER.decode(text)
        except KeySetTwice as error:
            yield Refused(f"the key {error.key!r} is there twice")
            continue
        except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
            cut = "; it has no line end, so the file may be cut" if not line.endswith(b"\n") else ""
            cut = "; a comma ends it, which no line of JSONL has" if line.rstrip().endswith(b",") else cut
            raise ValueError(f"{file}: line {number} is not valid JSON: {error}{cut}") from None
        yield _object(file, f"line {number}", row)


def _object(file: File, place: str, row) -> Row:
    """Return the row, if it is an object. Raises ValueError with its place."""
    if not isinstance(row, dict):
        raise ValueError(f"{file}: {place} is a {type(row).__name__}; expected an object with named columns")
    return _in_viewer(row)


def _in_viewer(row: dict) -> dict | Refused:
    """The row that the hub's dataset viewer has put into an object with its number; any other row as it is."""
    if not {"row_idx", "row"} <= row.keys() <= {"row_idx", "row", "truncated_cells"} or not isinstance(row["row"], dict):
        return row
    return Refused("the dataset viewer has cut its cells: download the dataset itself") if row.get("truncated_cells") else row["row"]


def _unwrapped(file: File, only: dict) -> list[Row]:
    """Return the rows of a file that holds one object: the object, or the rows in it. Raises ValueError for columns in place of rows."""
    rows = {name: value for name, value in only.items() if _is_table(value) and name.lower() in WRAPPERS | SPLITS}
    if rows and not any(isinstance(value, list) and value for name, value in only.items() if name not in rows):
        name = next(iter(rows))
        _refuse_lost(file, name, only)
        return [_in_viewer(row) for row in rows[name]]
    if isinstance(only.get("columns"), list) and isinstance(only.get("data"), list):
        raise ValueError(f"{file} holds columns and data apart, not rows: {AS_ROWS}")
    lists = [value for value in only.values() if isinstance(value, list) and value and not _is_table(value, messages=True)]
    is_row = _is_line(file) and (len(lists) < 2 or not all(isinstance(one, str) for several in lists for one in several))
    if lists and len(lists) == len(only) and len(set(map(len, lists))) == 1 and not is_row:
        raise ValueError(f"{file} holds the columns {shown(list(only))} as lists, not rows: {AS_ROWS}")
    if only and all(isinstance(value, dict) and value and all(key.isdigit() for key in value) for value in only.values()):
        raise ValueError(f"{file} holds the columns {shown(list(only))} as objects, not rows: {AS_ROWS}")
    return [only]


def _is_line(file: File) -> bool:
    """Whether each line of a file is a row, by its name, also where there is one."""
    return unpacked_name(file.name).lower().endswith((".jsonl", ".ndjson"))


def _refuse_lost(file: File, name: str, around: dict) -> None:
    """Raise ValueError where the object around the rows `name` has other rows, or what is meant for each row."""
    others = [key for key, value in around.items() if key != name and _is_table(value)]
    if others:
        raise ValueError(f"{file} holds the rows of {', '.join([name, *others])} in one object: write each as a file of its own")
    if texts := [key for key, value in around.items() if key.lower() in AROUND and value]:
        raise ValueError(f"{file}: the object around the rows has {texts[0]}, which would be lost: write it into each row")


def _is_table(value, messages: bool = False) -> bool:
    """Whether a value is a list of objects: of rows, and not of messages; with `messages`, of messages."""
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return False
    return any(key in value[0] for key in ("role", "from")) == messages
