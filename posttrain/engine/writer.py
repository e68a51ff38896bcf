"""Writes DeepSpeed's checkpoint files in a thread while training goes on, flushes them to disk, and computes their checksums."""

import copy
import copyreg
import os
import threading
from pathlib import Path

import torch
import xxhash
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.zero.config import ZeroStageEnum

# Python 3.11.2, Debian 12's, pickles an enum as a call of getattr, which weights_only loading refuses: no checkpoint could be loaded
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))
CHUNK = 2**24  # bytes written at a time
FLUSH = 2**28  # bytes between flushes


class BackgroundWriter(CheckpointEngine):
    """A DeepSpeed checkpoint engine. `save` copies the state to host memory, while training waits; after `commit` a thread writes it.

    The host memory for one copy of this rank's state is reused by later saves: allocating it costs more time than the copy itself.
    (DeepSpeed 0.19.8's decoupled engine fails at construction, its fast engine writes while training waits.)
    """

    def __init__(self):
        super().__init__()
        self.jobs: list[tuple[dict, Path]] = []
        self.buffers: dict[tuple[str, int], torch.Tensor] = {}
        self.files: dict[str, dict] = {}  # the current save's files: name -> size and checksum
        self.error: OSError | None = None
        self.thread: threading.Thread | None = None
        self.bytes_written = 0
        self.beside: dict[str, dict] = {}  # further files of the next save: name -> content

    def create(self, info) -> None:
        """Begin a save. DeepSpeed calls it, then `save` for each file, then `commit`."""
        assert self.is_done, "a save begins while another is written"
        self.jobs, self.files, self.error = [], {}, None

    def save(self, state_dict, path: str) -> None:
        """Copy a file's content to host memory."""
        self.jobs.append((self._host_copy(state_dict, Path(path).name), Path(path)))

    def commit(self, info) -> bool:
        """Start the thread that writes the files."""
        for name, state in self.beside.items():
            self.save(state, str(Path(info.save_dir) / info.tag / name))
        get_accelerator().synchronize()  # waits for the copies from a GPU
        self.thread = threading.Thread(target=self._write, name="checkpoint writer")
        self.thread.start()
        return True

    def load(self, path: str, map_location=None):
        """Raises NotImplementedError; DeepSpeed's interface requires the method."""
        raise NotImplementedError("checkpoints are read by posttrain/engine/shards.py, which knows every layout")

    @property
    def is_done(self) -> bool:
        """Whether this rank writes no more: its files are all written, or one has failed."""
        return self.thread is None or not self.thread.is_alive()

    def _host_copy(self, state: dict, file: str):
        """Returns a deep copy of `state` whose tensors are in reused buffers in host memory."""
        tensors: list[torch.Tensor] = []
        tensors_in(state, tensors)
        copies, seen = {}, {}
        for index, tensor in enumerate(tensors):
            place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if place not in seen:  # else tied weights would be written twice
                seen[place] = self._buffer(file, index, tensor)
                seen[place].copy_(tensor.detach(), non_blocking=True)
            copies[id(tensor)] = seen[place]
        return copy.deepcopy(state, copies)  # the second argument, the memo, maps ids of objects to their copies

    def _buffer(self, file: str, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the buffer for tensor number `index` of a file, from an earlier save if its shape and type still fit."""
        buffer = self.buffers.get((file, index))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self.buffers[file, index] = buffer
        return buffer

    def _write(self) -> None:
        """Write the files, in the thread; an error is kept in `error`."""
        try:
            for state, path in self.jobs:
                with _CheckedFile(path, self) as file:
                    torch.save(state, file)
                self.files[path.name] = file.facts
        except Exception as error:  # after any error the files are incomplete; torch wraps that of a full disk in a RuntimeError
            self.error = error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}".splitlines()[0])
        finally:
            self.jobs = []


class _CheckedFile:
    """A file for torch.save to write to: computes the checksum of what passes, and is flushed to disk when it is closed."""

    def __init__(self, path: Path, writer: BackgroundWriter):
        self.path, self.writer, self.size, self.hash = path, writer, 0, xxhash.xxh3_128()

    def __enter__(self):
        self.file = self.path.open("wb", buffering=0)
        return self

    def write(self, data) -> int:
        view, written = memoryview(data).cast("B"), 0
        while written < len(view):  # torch.save passes a whole tensor, and an unbuffered write may write only a part of it
            piece = view[written : written + CHUNK]
            count = self.file.write(piece)
            self.hash.update(piece[:count])
            written += count
            if self.size // FLUSH < (self.size + count) // FLUSH:
                os.fdatasync(self.file.fileno())  # so that bytes_written are on the disk, and closing does not take long
            self.size += count
            self.writer.bytes_written += count
        return len(view)

    def flush(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            os.fsync(self.file.fileno())
        self.file.close()

    @property
    def facts(self) -> dict:
        """Size in bytes and XXH3 checksum of what was written, as `files.file_facts` returns them."""
        return {"size": self.size, "xxh3": self.hash.hexdigest()}


def tensors_in(value, tensors: list[torch.Tensor]) -> None:
    """Append every tensor in nested dicts, lists and tuples to `tensors`, in order."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, tensors)
    elif isinstance(value, list | tuple):
        for item in value:
            tensors_in(item, tensors)
