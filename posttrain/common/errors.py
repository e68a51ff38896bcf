"""Error messages: shorten them, tell a user's mistake from a failure, suggest a correct spelling."""

import difflib
from pathlib import Path


def first_line(error: Exception) -> str:
    """Returns the first line of the error's message, at most 150 characters; the name of its class if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:150]


def is_mistake(error: Exception) -> bool:
    """Whether the user made a mistake, so that the same command would fail again: a ValueError, or a file error raised by us (no errno)."""
    return isinstance(error, ValueError) or (isinstance(error, FileNotFoundError | FileExistsError) and error.errno is None)


def nearest(name: str, known) -> str:
    """Returns ' Did you mean X?', X being the known name closest to a misspelt one; an empty string if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def nearest_path(path: str) -> str:
    """Returns ' Did you mean X?', X being what lies in the same folder under the name closest to a path's that is not there; else ''."""
    folder = Path(path).parent
    names = [one.name for one in folder.iterdir()] if folder.is_dir() and not Path(path).exists() else []
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    return f" Did you mean {folder / close[0]}?" if close else ""
