"""Writes what preparation makes: chunk after chunk into a staging folder, then the chosen rows into the prepared folder.

    DIR.incomplete/request.json             what was asked for; another request starts over, the same one goes on
    DIR.incomplete/request.lock             locked by the process that prepares
    DIR.incomplete/chunks/0.000003.arrow    source 0, fourth chunk: rows and hashes
    DIR.incomplete/chunks/0.000003.json     its share of the ledger, and its checksum; written after it

Each file appears by a rename, so whatever is there is whole, and the last chunk of a source says where to go on. Nothing here holds more
than one chunk in memory, apart from a few bytes for each row.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from data_prep.examples import Example
from data_prep.options import refuse_output
from data_prep.proof import text_hash
from data_prep.workers import work_on
from posttrain.common import files
from posttrain.common.errors import shown
from posttrain.common.links import open_own, refuse_links
from posttrain.data.prepared import fingerprint_file

HIDDEN = "hidden characters"  # in Chunk.facts["changes"]: how many rows hold some
WORKERS_END = 2.0  # seconds in which the workers of a killed process are gone
SPELLED = "special tokens as text"  # in the same place: how many rows spell some
SHARD_BYTES = 100_000_000  # of a data file, about; several are written at once
HASHES = ("_prompt", "_row", "_tokens", "_trained", "_signature")  # columns of a chunk that the prepared folder does not have


class Chunk(NamedTuple):
    """A file of encoded examples, and what became of the rows that they are from."""

    path: Path
    facts: dict  # next_row, rows, dropped: [[row, cause], ...], changes: {what: count}, encoder, last, file: its size and checksum

    def table(self) -> pa.Table:
        """Its rows, memory-mapped."""
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_file(file).read_all()


class Staging:
    """The folder with the chunks of one request; those of another request are removed. Made by `locked_staging`."""

    def __init__(self, folder: Path, request: dict):
        self.folder, asked = folder, folder / "request.json"
        request = json.loads(json.dumps(request))
        if not asked.exists() or files.read_object(asked) != request:
            _remove_chunks(folder)
            files.write_whole(asked, json.dumps(request, indent=2))
        (folder / "chunks").mkdir(exist_ok=True)
        shutil.rmtree(folder / "whole", ignore_errors=True)
        for unfinished in (folder / "chunks").glob(f"*{files.INCOMPLETE}"):
            unfinished.unlink()

    def start_over(self) -> None:
        """Remove all chunks."""
        _remove_chunks(self.folder)
        (self.folder / "chunks").mkdir()

    def encoders(self) -> set[str]:
        """The names of what has encoded the chunks that are there; those of versions before 0.3 do not say it."""
        facts = [files.read_object(path) for path in (self.folder / "chunks").glob("*.json")]
        return {one.get("encoder", "") for one in facts}

    def chunks(self, source: int) -> list[Chunk]:
        """The chunks of a source that are there, in order."""
        paths = sorted((self.folder / "chunks").glob(f"{source}.*.json"))
        return [Chunk(path.with_suffix(".arrow"), files.read_object(path)) for path in paths]

    def sound_chunks(self, source: int) -> list[Chunk]:
        """The chunks of a source up to the first that is damaged, which is told; what is there from it on is removed, to be made again."""
        chunks = []
        while (path := self._path(source, len(chunks))).with_suffix(".json").exists():
            try:
                chunks.append(_undamaged(path))
            except (ValueError, FileNotFoundError) as error:
                print(f"{error}: its rows, and those after them, are encoded again", flush=True)
                break
        kept = {chunk.path.stem for chunk in chunks}
        for path in (self.folder / "chunks").glob(f"{source}.*"):
            if path.stem not in kept:
                path.unlink()
        return chunks

    def add(self, source: int, number: int, table: pa.Table, facts: dict) -> None:
        """Write a chunk, then its facts with the checksums of both."""
        path = self._path(source, number)
        with files.written_whole(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        facts |= {"file": files.file_facts(path)}
        files.write_whole(path.with_suffix(".json"), json.dumps(facts | {"checksum": files.checksum(facts)}))

    def publish(self, output: Path) -> None:
        """Make the folder `whole` appear as the output, at once, and remove the rest."""
        files.sync_files(self.folder / "whole")  # the rename cannot survive a power cut that the data did not
        (self.folder / "whole").rename(output)
        _remove_chunks(self.folder)
        for name in ("request.json", "request.lock"):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody has put a file of theirs into it
            self.folder.rmdir()

    def _path(self, source: int, number: int) -> Path:
        return self.folder / "chunks" / f"{source}.{number:06d}.arrow"


@contextlib.contextmanager
def locked_staging(output: Path, request: dict) -> Iterator[Staging]:
    """Open the staging folder beside an output, for this process alone until the block ends.

    Raises FileExistsError if the output is there; ValueError if another process prepares it, or if the folder is not preparation's.
    """
    folder = output.with_name(output.name + files.INCOMPLETE)
    _refuse_foreign(folder)
    folder.mkdir(exist_ok=True)
    with open(open_own(folder / "request.lock"), "r+b") as lock:
        if not _locked(lock):
            raise ValueError(f"{output} is in use by another process that prepares it; wait for it, or stop it")
        refuse_output(output)  # the other process may have ended just before
        yield Staging(folder, request)


def _locked(lock: BinaryIO) -> bool:
    """Lock a file, which the workers of a process that was killed may hold for a moment longer; return whether that could be done."""
    until = time.monotonic() + WORKERS_END
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)


def _refuse_foreign(folder: Path) -> None:
    """Raise ValueError unless a folder is absent, or made by preparation, as its request says: what is in it is removed in the end."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} is no folder, and preparation keeps its work there: move it away, or give another --output_dir")
    refuse_links(folder)
    asked, names = folder / "request.json", sorted(path.name for path in folder.iterdir())
    try:
        ours = {"format", "kind", "sources"} <= files.read_object(asked).keys()
    except FileNotFoundError:
        ours = all(name.startswith("request.") for name in names)  # killed as it began, or as it removed its work
    except ValueError as error:
        raise ValueError(f"{error}; remove {folder}, and the same command starts over") from error
    if not ours:
        raise ValueError(
            f"{folder} holds {shown(names)}, which are not preparation's: it keeps its work in that folder, and removes it in the end. "
            "Move the folder away, or give another --output_dir"
        )


def _remove_chunks(folder: Path) -> None:
    """Remove a staging folder's chunks, which a rename makes nobody's work at once: killed in between, the next one starts over."""
    shutil.rmtree(folder / "whole", ignore_errors=True)
    if (folder / "chunks").is_dir():
        (folder / "chunks").rename(folder / "whole")
        shutil.rmtree(folder / "whole", ignore_errors=True)


def table_of(examples: list[tuple[str, Example]], columns: tuple[str, ...], signatures: list[np.ndarray] | None) -> pa.Table:
    """The chunk's table of (source id, example) pairs: columns of int32 lists, and the numbers and hashes that choosing needs."""
    arrays = {name: _lists_of([example.columns[name] for _, example in examples]) for name in columns}
    compared = list(arrays.values())  # rows of which another part is trained are no copies
    if "labels" in columns:
        arrays["num_trained"] = pa.array([example.trained for _, example in examples], pa.int32())
    arrays["source"] = pa.array([source for source, _ in examples], pa.string())
    arrays["proof"] = pa.array([example.proof for _, example in examples], pa.uint64())
    arrays["_prompt"] = pa.array([text_hash(example.prompt) for _, example in examples], pa.uint64())
    arrays["_row"] = pa.array(_row_hashes(compared), pa.uint64())
    arrays["_tokens"] = pa.array([example.length for _, example in examples], pa.int32())
    arrays["_trained"] = pa.array([example.trained for _, example in examples], pa.int32())
    if signatures is not None:
        arrays["_signature"] = pa.array(list(signatures), pa.list_(pa.uint32()))
    return pa.table(arrays)


def _lists_of(rows: list[np.ndarray]) -> pa.ListArray:
    """A column of lists of int32."""
    values = np.concatenate([np.zeros(0, np.int32), *rows])
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, rows)]), pa.int32()), pa.array(values))


def _row_hashes(columns: list[pa.ListArray]) -> np.ndarray:
    """A uint64 for each row, equal for rows with the same ids in all columns."""
    flat = [(column.values.to_numpy().view(np.uint8).data, (4 * column.offsets.to_numpy()).tolist()) for column in columns]
    hashes = []
    for row in range(len(columns[0])):
        digest = hashlib.blake2b(digest_size=8)
        for ids, starts in flat:
            digest.update(ids[starts[row] : starts[row + 1]])
            digest.update(b"|")
        hashes.append(digest.digest())
    return np.frombuffer(b"".join(hashes), "<u8")


def column(chunks: list[Chunk], name: str) -> np.ndarray:
    """The numbers in a column, of all rows of the chunks."""
    values = [chunk.table().column(name).to_numpy() for chunk in chunks]
    return np.concatenate(values) if values else np.zeros(0, np.uint64)


def write_split(chunks: list[Chunk], counts: np.ndarray, folder: Path, most: int) -> dict[str, dict]:
    """Write row i of the chunks counts[i] times, as a folder for datasets.load_from_disk, in up to `most` processes.

    The same rows give the same bytes. Returns the size and hash of each data file, by its name.
    """
    if not counts.any():
        return {}  # an Arrow folder cannot be empty
    folder.mkdir(parents=True)
    shards = list(_shards(chunks, counts))
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]

    def write(number: int, shard: list[tuple[Chunk, np.ndarray]]) -> tuple[str, dict]:
        path = folder / names[number]
        tables = _chosen(shard)
        first = next(tables)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)
        return path.name, fingerprint_file(path)

    found = dict(work_on(shards, write, most))
    with pa.OSFile(str(folder / names[0])) as file, pa.ipc.open_stream(file) as written:
        features = datasets.Features.from_arrow_schema(written.schema)
    datasets.DatasetInfo(features=features).write_to_directory(folder)
    # datasets (5.2) writes its other file only where it copies all rows once more, with a random fingerprint
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": f"{text_hash(f'{names} {int(counts.sum())}'):016x}",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return found


def _shards(chunks: list[Chunk], counts: np.ndarray) -> Iterator[list[tuple[Chunk, np.ndarray]]]:
    """Yield the chunks of which rows are chosen, with how often each row is, as many together as give a file of about SHARD_BYTES."""
    shard, size, at = [], 0.0, 0
    for chunk in chunks:
        rows = len(chunk.table())
        mine = counts[at : at + rows]
        at += rows
        if mine.any():
            shard.append((chunk, mine))
            size += chunk.facts["file"]["size"] * mine.sum() / rows
        if size > SHARD_BYTES:
            yield shard
            shard, size = [], 0.0
    if shard:
        yield shard


def _chosen(shard: list[tuple[Chunk, np.ndarray]]) -> Iterator[pa.Table]:
    """Yield each row of the chunks as often as is said, in a table for each chunk, without the columns of HASHES."""
    for chunk, counts in shard:
        table = chunk.table()
        columns = [name for name in table.column_names if name not in HASHES]
        rows = pa.array(np.repeat(np.arange(len(table)), counts))
        yield table.select(columns).replace_schema_metadata(None).take(rows).combine_chunks()


def _undamaged(path: Path) -> Chunk:
    """The chunk in a file. Raises ValueError or FileNotFoundError if it is not what was written, or its facts are not."""
    files.require_file(path)
    facts = files.read_object(path.with_suffix(".json"))
    if facts.pop("checksum", None) != files.checksum(facts) or files.file_facts(path) != facts.get("file"):
        raise ValueError(f"{path} is damaged (its checksum differs)")
    return Chunk(path, facts)
