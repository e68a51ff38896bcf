"""Saves votes of the comparison page as preference pairs that data_prep/prepare_dpo.py reads: talk, vote, train again."""

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path


def _private(path: str, flags: int) -> int:
    """Open a file that only its owner may read where it is made anew: it holds what people typed."""
    return os.open(path, flags, 0o600)


class Votes:
    """A JSONL file that votes are appended to. A vote's line is whole or absent, and on the disk before the vote is confirmed."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()

    def add(self, prompt: list[dict], chosen: str, rejected: str, chosen_model: str, rejected_model: str) -> None:
        """Append the vote that `chosen` is the better answer to `prompt`, messages of which the last is the user's; from any thread.

        Raises OSError where it cannot be written; then the file is as before.
        """
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_model": chosen_model, "rejected_model": rejected_model}
        line = json.dumps(row | {"when": datetime.now(UTC).isoformat(timespec="seconds")}, ensure_ascii=False) + "\n"
        with self.lock, open(self.path, "a+b", buffering=0, opener=_private) as file:
            size = file.seek(0, os.SEEK_END)
            unended = size and os.pread(file.fileno(), 1, size - 1) != b"\n"  # the file was edited, or the machine went down
            data = memoryview(b"\n" * unended + line.encode())
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
