"""The Hugging Face hub: which paths are names on it, whether it can be reached, and what a download may leave in a folder."""

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"  # how the text begins that git puts in a file's place where git-lfs is not installed


def is_hub_name(path: str) -> bool:
    """Whether a path is a name on the hub: it looks like org/name, and there is no folder ./org, in which it would be a mistyped path."""
    looks_like_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) and not path.endswith((".model", ".json", ".yaml", ".yml", ".pt"))
    return bool(looks_like_one) and not os.path.isdir(path.split("/")[0])


@functools.cache
def is_reachable() -> bool:
    """Whether the hub answers one short request; False in offline mode. Saves a mistyped path or an offline machine minutes of retries."""
    import huggingface_hub  # in here: to tell a hub name from a path nothing is imported

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # the error's type depends on huggingface_hub's HTTP client; any error means that the hub is out of reach
        return False
    return True


def refuse_pointers(folder: str | Path, names: Iterable[str]) -> None:
    """Raise ValueError if one of these files of a folder is a git-lfs pointer, a short text that stands for a file not downloaded."""
    for name in names:
        path = Path(folder) / name
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise ValueError(
                f"{path} is a git-lfs pointer, a text that stands for a file which was not downloaded, as after git clone without git-lfs: "
                f"run `git lfs install && git lfs pull` in {folder}, or download it again with hf download"
            )


def snapshot_in(path: str) -> str:
    """Return the folder of the files inside one of the hub's cache (models--org--name, datasets--org--name); any other path as it is.

    It is the snapshot that refs/main names, else the only one. Raises ValueError where there are several, FileNotFoundError for none.
    """
    place = Path(path)
    if not place.name.startswith(("models--", "datasets--")) or not (place / "snapshots").is_dir():
        return path
    main = place / "refs" / "main"
    named = place / "snapshots" / main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if named and named.is_dir():
        return str(named)
    snapshots = sorted(str(one) for one in (place / "snapshots").iterdir() if one.is_dir())
    if not snapshots:
        raise FileNotFoundError(f"{path} is a folder of the hub's cache without a snapshot: the download did not finish; start it again")
    if len(snapshots) > 1:
        raise ValueError(
            f"{path} is a folder of the hub's cache with {len(snapshots)} snapshots and no refs/main; name one: {', '.join(snapshots[:3])}"
        )
    return snapshots[0]
