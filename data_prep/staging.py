"""Writes what preparation makes: chunk after chunk into a staging folder, then the chosen rows into the prepared folder.

    DIR.incomplete/request.json             what was asked for; another request starts over, the same one goes on
    DIR.incomplete/chunks/0.000003.arrow    source 0, fourth chunk: rows, hashes, and its share of the ledger

Each chunk appears by a rename, so whatever is there is whole, and the last chunk of a source says where to go on. Nothing here holds more
than one chunk in memory, apart from a few bytes for each row.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from data_prep.examples import Example
from data_prep.proof import text_hash
from posttrain.common import files

HIDDEN = "hidden characters"  # in Chunk.facts["changes"]: how many rows hold some
SHARD_BYTES = 500_000_000  # of a data file, about
HASHES = ("_prompt", "_row", "_tokens", "_trained", "_signature")  # columns of a chunk that the prepared folder does not have


class Chunk(NamedTuple):
    """A file of encoded examples, and what became of the rows that they are from."""

    path: Path
    facts: dict  # next_row, rows, dropped: [[row, cause], ...], changes: {what: count}

    def table(self) -> pa.Table:
        """Its rows, memory-mapped."""
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_file(file).read_all()


class Staging:
    """The folder beside the output with the chunks of one request; those of another request are removed."""

    def __init__(self, output: Path, request: dict):
        self.folder = output.with_name(output.name + ".incomplete")
        request = json.loads(json.dumps(request))
        asked = self.folder / "request.json"
        if not asked.is_file() or json.loads(asked.read_text(encoding="utf-8")) != request:
            discard(self.folder)
            self.folder.mkdir()
            files.write_whole(asked, json.dumps(request, indent=2))
        (self.folder / "chunks").mkdir(exist_ok=True)
        shutil.rmtree(self.folder / "whole", ignore_errors=True)
        for unfinished in (self.folder / "chunks").glob("*.incomplete"):
            unfinished.unlink()

    def chunks(self, source: int) -> list[Chunk]:
        """The chunks of a source that are there, in order."""
        paths = sorted((self.folder / "chunks").glob(f"{source}.*.arrow"))
        return [Chunk(path, _facts(path)) for path in paths]

    def add(self, source: int, number: int, table: pa.Table, facts: dict) -> None:
        """Write a chunk with its facts."""
        table = table.replace_schema_metadata({"facts": json.dumps(facts)})
        path = self.folder / "chunks" / f"{source}.{number:06d}.arrow"
        with files.written_whole(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    def publish(self, output: Path) -> None:
        """Make the folder `whole` appear as the output, at once, and remove the rest."""
        files.sync_files(self.folder / "whole")  # the rename cannot survive a power cut that the data did not
        (self.folder / "whole").rename(output)
        discard(self.folder)


def discard(folder: Path) -> None:
    """Remove a staging folder. Its request goes first: killed in between, what is left is no longer taken for anybody's work."""
    (folder / "request.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def table_of(examples: list[tuple[str, Example]], columns: tuple[str, ...], signatures: list[np.ndarray] | None) -> pa.Table:
    """The chunk's table of (source id, example) pairs: columns of int32 lists, and the numbers and hashes that choosing needs."""
    arrays = {name: pa.array([example.columns[name] for _, example in examples], pa.list_(pa.int32())) for name in columns}
    ids = [array for name, array in arrays.items() if name != "labels"]  # rows of the same ids are copies, whatever is trained of them
    if "labels" in columns:
        arrays["num_trained"] = pa.array([example.trained for _, example in examples], pa.int32())
    arrays["source"] = pa.array([source for source, _ in examples], pa.string())
    arrays["proof"] = pa.array([example.proof for _, example in examples], pa.uint64())
    arrays["_prompt"] = pa.array([text_hash(example.prompt) for _, example in examples], pa.uint64())
    arrays["_row"] = pa.array(_row_hashes(ids), pa.uint64())
    arrays["_tokens"] = pa.array([example.length for _, example in examples], pa.int32())
    arrays["_trained"] = pa.array([example.trained for _, example in examples], pa.int32())
    if signatures is not None:
        arrays["_signature"] = pa.array(list(signatures), pa.list_(pa.uint32()))
    return pa.table(arrays)


def _row_hashes(columns: list[pa.ListArray]) -> np.ndarray:
    """A uint64 for each row, equal for rows with the same ids in all columns."""
    flat = [(column.values.to_numpy(), column.offsets.to_numpy()) for column in columns]
    hashes = np.empty(len(columns[0]), np.uint64)
    for row in range(len(hashes)):
        digest = hashlib.blake2b(digest_size=8)
        for values, starts in flat:
            digest.update(values[starts[row] : starts[row + 1]].tobytes() + b"|")
        hashes[row] = int.from_bytes(digest.digest(), "little")
    return hashes


def column(chunks: list[Chunk], name: str) -> np.ndarray:
    """The numbers in a column, of all rows of the chunks."""
    values = [chunk.table().column(name).to_numpy() for chunk in chunks]
    return np.concatenate(values) if values else np.zeros(0, np.uint64)


def write_split(chunks: list[Chunk], counts: np.ndarray, folder: Path) -> None:
    """Write row i of the chunks counts[i] times, as a folder for datasets.load_from_disk. The same rows give the same bytes."""
    if not counts.any():
        return  # an Arrow folder cannot be empty
    folder.mkdir(parents=True)
    tables, shards = _chosen(chunks, counts), []
    for first in tables:
        shards.append(folder / f"shard-{len(shards)}")
        with pa.OSFile(str(shards[-1]), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
            written = 0
            for table in itertools.chain([first], tables):
                writer.write_table(table)
                written += table.nbytes
                if written > SHARD_BYTES:
                    break
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(first.schema)).write_to_directory(folder)
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


def _chosen(chunks: list[Chunk], counts: np.ndarray) -> Iterator[pa.Table]:
    """Yield row i of the chunks counts[i] times, in a table for each chunk that has any, without the columns of HASHES."""
    at = 0
    for chunk in chunks:
        table = chunk.table()
        mine = np.repeat(np.arange(len(table)), counts[at : at + len(table)])
        at += len(table)
        if len(mine):
            columns = [name for name in table.column_names if name not in HASHES]
            yield table.select(columns).replace_schema_metadata(None).take(pa.array(mine)).combine_chunks()


def _facts(path: Path) -> dict:
    """What a chunk's file says about its rows; see Chunk."""
    with pa.memory_map(str(path)) as file:
        return json.loads(pa.ipc.open_file(file).schema.metadata[b"facts"])
