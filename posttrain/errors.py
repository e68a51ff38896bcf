"""What errors say."""


def first_line(error: Exception) -> str:
    """Of its message, at most 150 characters of it; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:150]
