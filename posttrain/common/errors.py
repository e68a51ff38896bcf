"""Error messages: shorten them, tell a user's mistake from a failure, suggest a correct spelling."""

import difflib
import errno
import json
import re
import reprlib
import sysconfig
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
OURS = tuple(f"{folder}/" for folder in (PACKAGE, PACKAGE.parent / "data_prep", PACKAGE.parent / "launch"))
LIBRARIES = tuple({f"{sysconfig.get_path(name)}/" for name in ("purelib", "platlib", "stdlib", "platstdlib")})
# advice of libraries that no command here can follow, or that points to a report which is not shown
ADVICE = re.compile(r"trust_remote_code|ignore_mismatched_sizes|above|install|https?:|from_pretrained|argument", re.IGNORECASE)

MOST_SHOWN = 300  # characters of a value in a message
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, MOST_SHOWN, MOST_SHOWN, MOST_SHOWN


def shown(value) -> str:
    """Returns a value's repr for a message, shortened where it is long: of a stranger's file it may be of any size."""
    text = _short.repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def shown_name(name) -> str:
    """Returns a name for a message as `shown` does, without quotes where it is a text."""
    return shown(name).strip("'")


# what to do about a system error, by its number
REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room, or have the quota raised", errno.EFBIG: "raise the limit of a file's size"}
REMEDIES |= {errno.EIO: "look at the disk", errno.EROFS: "make it writable, or name another place", errno.ESTALE: "mount it again"}
REMEDIES |= {errno.EACCES: "have it made accessible to you, or name another place", errno.EMFILE: "raise ulimit -n"}


def first_line(error: Exception) -> str:
    """Returns the first line of the error's message, at most 150 characters; the name of its class if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:150]


def reason(error: Exception) -> str:
    """Returns in one sentence why a library failed: its message's first, without advice that leads nowhere here, and its class's name."""
    text = re.sub(r":\n\s*", ": ", str(error))  # huggingface_hub's validation names the field in one line, and what is wrong in the next
    sentence = re.split(r"(?<=[.!?])\s|\n", text)[0][:200]
    name = "" if isinstance(error, OSError | ValueError) or ": " in sentence else f"{type(error).__name__}: "
    return f"an error of the library, {type(error).__name__}" if not sentence or ADVICE.search(sentence) else name + sentence


def is_mistake(error: Exception) -> bool:
    """Whether the user made a mistake, so that the same command would fail again: a ValueError or a file error (no errno) that we raised.

    A library's ValueErrors, those of text that is not UTF-8 or not JSON included, name no file: they are failures, told by `described`.
    """
    if isinstance(error, ValueError):
        return not isinstance(error, UnicodeError | json.JSONDecodeError) and _raised_by(error) is None
    return isinstance(error, FileNotFoundError | FileExistsError) and error.errno is None


def described(error: Exception) -> str:
    """Returns what to print about a ValueError or OSError; one of a library's ValueErrors with its kind and the place of the call."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}: {REMEDIES[error.errno]}, and the same command goes on"
    if not isinstance(error, ValueError) or is_mistake(error):
        return str(error)
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(OURS)]
    place = f" at {Path(ours[-1].filename).relative_to(PACKAGE.parent)}:{ours[-1].lineno}" if ours else ""
    whose = f" of {library}" if (library := _raised_by(error)) else ""
    return f"{type(error).__name__}{whose}{place}: {first_line(error)}. POSTTRAIN_TRACEBACK=1 shows where it comes from"


def _raised_by(error: Exception) -> str | None:
    """Returns the name of the library whose code raised an error; None if it was other code, or none has raised it yet."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or frames[-1].filename.startswith(OURS) or not frames[-1].filename.startswith(LIBRARIES):
        return None
    folder = max((one for one in LIBRARIES if frames[-1].filename.startswith(one)), key=len)
    return frames[-1].filename.removeprefix(folder).split("/")[0].removesuffix(".py")


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
