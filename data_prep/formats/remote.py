"""Files at other places than this machine's disks: s3://, gs://, hf://, https:// and whatever else fsspec knows."""

import re
from dataclasses import dataclass
from typing import Literal

from posttrain.common.errors import first_line

# what of a file's description changes when its content does, in the words of different places
FACTS = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "blob_id", "generation", "Content-MD5")
# a page of the hub, which is no file: of a dataset, or of a file or a folder of one
PAGE = re.compile(r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?(?:(?:blob|tree)/([^/]+)/?(.*))?(?:viewer.*)?$")


@dataclass(frozen=True)
class Address:
    """A file at another place; it has those of Path's properties that readers use."""

    address: str

    def __str__(self) -> str:
        return shown_address(self.address)

    @property
    def name(self) -> str:
        """Its name, without the folders and without what follows a question mark."""
        return str(self).rpartition("/")[2]

    def open(self, mode: Literal["rb"]):
        """Open it to read bytes, the only mode. Raises ValueError where that cannot be done."""
        assert mode == "rb"
        with _told(self.address):
            system, path = _system(self.address)
            if re.match("https?://", self.address) and not self.name.lower().endswith((".parquet", ".arrow")):
                return system.open(path, "rb", block_size=0)  # from its beginning: not every server gives parts of a file
            return system.open(path, "rb")

    def facts(self) -> dict[str, str]:
        """Return what changes when its content does."""
        with _told(self.address):
            system, path = _system(self.address)
            return {name: str(value) for name, value in system.info(path).items() if name in FACTS}


def is_address(place: str) -> bool:
    """Whether a place is an address, as in s3://bucket/rows.jsonl."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place))


def shown_address(address: str) -> str:
    """Return an address for messages and labels, without what follows a question mark, which may hold a key."""
    return address.partition("?")[0].rstrip("/") if re.match("https?://", address) else address.rstrip("/")


def without_keys(given):
    """Return what an option says, a text or a list of them, without what follows the question mark of an address: it may hold a key."""
    if isinstance(given, list):
        return [without_keys(one) for one in given]
    return re.sub(r"^(https?://[^?]*)\?.*?(:[\d.]+)?$", r"\1\2", given) if isinstance(given, str) else given


def listed(place: str) -> tuple[dict[str, Address], bool]:
    """Return the files at an address by their names within it, and whether it is a folder or a pattern, not a file.

    Raises ValueError where it cannot be reached, FileNotFoundError where nothing is there.
    """
    if page := PAGE.match(place):
        there = f"hf://datasets/{page[1]}" + (f"@{page[2]}/{page[3]}" if page[2] else "")
        raise ValueError(f"{place} is a page about a dataset: give {there}")
    with _told(place):
        system, path = _system(place)
        if re.match("https?://", place):
            system.info(path)
            return {Address(place).name: Address(place)}, False
        if "*" in path:
            found, root = system.glob(path), path[: path.index("*")].rpartition("/")[0]
        elif system.isdir(path):
            found, root = system.find(path), path.rstrip("/")
        elif system.exists(path):
            return {Address(place).name: Address(place)}, False
        else:
            found, root = None, ""
        names = {str(one): Address(system.unstrip_protocol(one)) for one in found or [] if system.isfile(one)}
    if found is None:
        raise FileNotFoundError(f"{place} does not exist")
    return {name.removeprefix(root).lstrip("/"): one for name, one in names.items()}, True


def _system(address: str):
    """Return the file system of an address, and the path in it."""
    import fsspec

    return fsspec.core.url_to_fs(address)


class _told:
    """Tells any error inside the block as a ValueError that names the address; those of clients are of many types."""

    def __init__(self, address: str):
        self.address = shown_address(address)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if not isinstance(error, Exception):
            return
        if isinstance(error, ImportError):
            raise ValueError(f"{self.address} needs a package that is not installed ({first_line(error)}): pip install it") from None
        if isinstance(error, ValueError) and str(error).startswith("Protocol not known"):
            raise ValueError(
                f"{self.address}: {first_line(error)}; expected one that fsspec knows, as s3://, gs://, hf:// or https://"
            ) from None
        raise ValueError(
            f"{self.address} cannot be read ({type(error).__name__}: {first_line(error)}): is the address right, and within reach?"
        ) from None
