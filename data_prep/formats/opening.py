"""Opens files of rows: by their names it knows what they hold, it unpacks them, and gives text of any Unicode as UTF-8."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from data_prep.formats.remote import Address
from posttrain.common.errors import first_line, is_mistake
from posttrain.common.hub import LFS_POINTER, refuse_pointers
from posttrain.data.parts import Refused

Row = dict | Refused
File = Path | Address
LONGEST_LINE = 2**26  # bytes of a row, or characters; one without an end, as a few packed bytes can hold, would take all memory
BLOCK = 2**20  # bytes that are read of a text, or of a Parquet column, at a time
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}  # what a file holds, by the end of its name
BINARY = ("parquet", "arrow")  # kinds that pack their columns themselves
READ = "JSON, JSONL, CSV, TSV, Parquet, Arrow or text file (a text may be packed: .gz, .zst, .xz, .bz2)"
UNICODE = {b"\xff\xfe\0\0": "utf-32-le", b"\0\0\xfe\xff": "utf-32-be", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
OTHER_KINDS = {
    b"\x1f\x8b": "gzipped; let its name end with .gz",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; let its name end with .zst",
    b"\xfd7zX": "packed by xz; let its name end with .xz",
    b"BZh": "packed by bzip2; let its name end with .bz2",
    b"PAR1": "Parquet; let its name end with .parquet",
    b"ARROW1": "Arrow; let its name end with .arrow",
    b"\xff\xff\xff\xff": "a stream of Arrow; let its name end with .arrow",
}  # by how a file of another kind than its name says starts
ADVICE = {
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "unpack it",
    (".xlsx", ".xls", ".ods", ".numbers"): "save the sheet as CSV",
    (".pkl", ".pickle", ".pt", ".npy", ".npz", ".db", ".sqlite", ".feather", ".orc", ".avro"): "write its rows as JSONL or Parquet",
    (".yaml", ".yml", ".xml", ".pdf", ".docx", ".html", ".md"): "write its rows as JSONL, or its text as .txt",
}  # what to do about a file, by the end of its name
NO_DATA = ("license", "readme", "notice", "makefile", "dockerfile", "copying", "authors")  # names without an end that people know


def kind_of(file: File) -> str | None:
    """Return what a file holds, one of the values of KINDS: by its name, or for a name without an end by how it starts; else None."""
    name = file.name.lower()
    bare = unpacked_name(name)
    for end, kind in KINDS.items():
        if bare.endswith(end):
            return kind
    if "." in name or name in NO_DATA:
        return None
    with file.open("rb") as opened:
        start = opened.read(64)
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if text[:1] in (b"{", b"["):
        return "json"
    return "parquet" if start.startswith(b"PAR1") else "arrow" if start.startswith((b"ARROW1", b"\xff" * 4)) else None


def unpacked_name(name: str) -> str:
    """Return a file's name, without what says how it is packed."""
    return next((name[: -len(end)] for end in PACKED if name.lower().endswith(end)), name)


def advice(file: File) -> str:
    """Return what is wrong with a file of no known kind, and what to do about it."""
    name = unpacked_name(file.name).lower()
    what = next((what for ends, what in ADVICE.items() if name.endswith(ends)), f"expected a {READ}")
    return f"has a name of no known kind; {what}"


def refuse_pointer(file: File) -> None:
    """Raise ValueError for a git-lfs pointer, a short text that stands for a file not downloaded."""
    if isinstance(file, Path):
        refuse_pointers(file.parent, [file.name])


@contextlib.contextmanager
def told(file: File) -> Iterator[None]:
    """Raise a ValueError that names the file for whatever goes wrong while it is read: it is cut, damaged, or far away."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:  # pyarrow's errors are OSErrors or ValueErrors
        raise ValueError(f"{file} cannot be read to its end, is it whole? ({type(error).__name__}: {error})") from error
    except Exception as error:  # the clients of other places raise errors of many types
        if not isinstance(file, Address) or is_mistake(error):
            raise
        raise ValueError(f"{file} cannot be read to its end ({type(error).__name__}: {first_line(error)})") from error


def too_long(file: File, place: str) -> ValueError:
    """Return the error for a row that has more than LONGEST_LINE bytes."""
    return ValueError(f"{file}: {place} has more than {LONGEST_LINE >> 20} MB, which no row for training has")


def open_text(file: File) -> io.BufferedReader:
    """Open a file of text, unpacked, as UTF-8. Raises ValueError for one of another kind than its name says."""
    opened = _unpacked(file)
    start = opened.peek(64)[:64]
    why = next((kind for magic, kind in OTHER_KINDS.items() if start.startswith(magic)), None)
    if start.startswith(LFS_POINTER):
        why = "a git-lfs pointer, which stands for a file that was not downloaded: download it"
    if len(start) > 3 and [byte == 0 for byte in start[:4]] in ([False, True] * 2, [True, False] * 2):
        why = "UTF-16 without a byte order mark; save it as UTF-8"
    if why:
        opened.close()
        raise ValueError(f"{file} is {why} (it starts with {start[:4]!r})")
    for magic, encoding in UNICODE.items():
        if start.startswith(magic):
            opened.read(len(magic))
            return io.BufferedReader(_AsUtf8(file, opened, encoding))
    return opened


def _unpacked(file: File) -> io.BufferedReader:
    name, raw = file.name.lower(), file.open("rb")
    if name.endswith(".gz"):
        raw = gzip.GzipFile(fileobj=raw)
    elif name.endswith(".bz2"):
        raw = bz2.BZ2File(raw)
    elif name.endswith(".xz"):
        raw = lzma.LZMAFile(raw)  # noqa: SIM115
    elif name.endswith((".zst", ".zstd")):
        import pyarrow  # only here: it takes long, and the command line asks for the kinds of files

        raw = pyarrow.CompressedInputStream(raw, "zstd")
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, 2**16)


class _AsUtf8(io.RawIOBase):
    """The bytes of a text of another Unicode, as UTF-8."""

    def __init__(self, file: File, opened: io.BufferedReader, encoding: str):
        self.file, self.opened, self.encoding = file, opened, encoding
        self.decoder, self.ready, self.ended = codecs.getincrementaldecoder(encoding)(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready and not self.ended:
            block = self.opened.read(BLOCK)
            try:
                self.ready = self.decoder.decode(block, final=not block).encode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.file} is not {self.encoding[:6].upper()}, as it begins ({error.reason}): save it as UTF-8"
                ) from None
            self.ended = not block
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.opened.close()
        super().close()
