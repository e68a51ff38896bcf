"""Refuses symbolic links in folders of somebody else's that would show, copy or change other files of this machine."""

import os
from collections.abc import Iterable
from pathlib import Path


def refuse_links(folder: str | os.PathLike, passed: tuple[str, ...] = ()) -> None:
    """Raise ValueError for a link in a folder, or below, that leads out of it; names that end with one of `passed` may be such links.

    Links of the hub's cache, to the file that a snapshot shares with others, are no such links.
    """
    root = os.path.realpath(folder)
    for path in _links(root):
        target = os.path.realpath(path)
        inside = target == root or target.startswith(root + os.sep)
        if not inside and not path.endswith(passed or ("\0",)) and not _is_blob(target):
            raise ValueError(
                f"{Path(folder) / os.path.relpath(path, root)} is a link to {target}, outside of {folder}. What lies there is shown to "
                "others, copied or written to: put the file itself in the link's place (cp --remove-destination), or remove the link"
            )


def open_own(path: Path) -> int:
    """Open a file for reading and writing, making it where it is not there; returns its descriptor. Raises OSError for a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _links(root: str) -> Iterable[str]:
    """Yield the links in a folder and the folders below, which are not followed; those of Weights & Biases in its own folder left out."""
    for place, folders, names in os.walk(root):
        for name in (*folders, *names):
            if os.path.islink(path := os.path.join(place, name)):
                yield path
        if place == root and "wandb" in folders:  # wandb (0.31) links its logs in there itself, and nothing here reads or writes them
            folders.remove("wandb")


def _is_blob(target: str) -> bool:
    """Whether a path is a file of the hub's cache: .../models--org--name/blobs/HASH, or datasets--org--name."""
    parts = Path(target).parts
    return len(parts) > 3 and parts[-2] == "blobs" and parts[-3].startswith(("models--", "datasets--"))
