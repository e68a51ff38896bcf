"""What errors say."""

import difflib


def first_line(error: Exception) -> str:
    """Of its message, at most 150 characters of it; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:150]


def is_mistake(error: Exception) -> bool:
    """Whether the command, or what it names, is wrong, and would be again: so said by this package, not by the system (errno)."""
    return isinstance(error, ValueError) or (isinstance(error, FileNotFoundError | FileExistsError) and error.errno is None)


def nearest(name: str, known) -> str:
    """' Did you mean X?' for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
