"""What preparation writes: chunk after chunk into a staging folder, then the chosen rows into the prepared folder.

    DIR.incomplete/request.json       what was asked for; another request starts over, the same one goes on
    DIR.incomplete/parts/0.000003.arrow    source 0, fourth chunk: rows, hashes, and its share of the ledger

Each part appears by a rename, so whatever is there is whole, and the last part of a source says where to go on. Nothing here holds more
than one part in memory, apart from some bytes a row.
"""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from data_prep.examples import Example, number_of, row_hashes

SHARD_BYTES = 500_000_000
HASHES = ("_prompt", "_row", "_tokens", "_trained", "_signature")  # columns of a part that the prepared folder does not have


class Part(NamedTuple):
    path: Path
    facts: dict  # next_row, rows, dropped: [[row, cause], ...], changes: {what: count}

    def table(self) -> pa.Table:
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_file(file).read_all()


class Staging:
    """The parts of one request, in the folder beside the output."""

    def __init__(self, output: Path, request: dict):
        self.folder = output.with_name(output.name + ".incomplete")
        request = json.loads(json.dumps(request))
        asked = self.folder / "request.json"
        if not asked.is_file() or json.loads(asked.read_text()) != request:
            discard(self.folder)
            (self.folder / "parts").mkdir(parents=True)
            _write_whole(asked, json.dumps(request, indent=2).encode())
        shutil.rmtree(self.folder / "whole", ignore_errors=True)
        for unfinished in (self.folder / "parts").glob("*.tmp"):
            unfinished.unlink()

    def parts(self, source: int) -> list[Part]:
        paths = sorted((self.folder / "parts").glob(f"{source}.*.arrow"))
        return [Part(path, _facts(path)) for path in paths]

    def add(self, source: int, number: int, table: pa.Table, facts: dict) -> None:
        table = table.replace_schema_metadata({"facts": json.dumps(facts)})
        path = self.folder / "parts" / f"{source}.{number:06d}.arrow"
        temporary = path.with_suffix(".tmp")
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        temporary.rename(path)

    def publish(self, output: Path) -> None:
        """The prepared folder appears, whole."""
        _sync(self.folder / "whole")
        (self.folder / "whole").rename(output)
        discard(self.folder)


def discard(folder: Path) -> None:
    """Remove a staging folder. Its request goes first: killed in between, what is left is no longer taken for anybody's work."""
    (folder / "request.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def table_of(examples: list[tuple[str, Example]], columns: tuple[str, ...], signatures: list[np.ndarray] | None) -> pa.Table:
    """(source id, example) pairs as columns of int32 lists, with the hashes that choosing needs."""
    arrays = {name: pa.array([example.columns[name] for _, example in examples], pa.list_(pa.int32())) for name in columns}
    ids = [array for name, array in arrays.items() if name != "labels"]
    if "labels" in columns:
        arrays["num_trained"] = pa.array([example.trained for _, example in examples], pa.int32())
    arrays["source"] = pa.array([source for source, _ in examples], pa.string())
    arrays["proof"] = pa.array([example.proof for _, example in examples], pa.uint64())
    arrays["_prompt"] = pa.array([number_of(example.prompt) for _, example in examples], pa.uint64())
    arrays["_row"] = pa.array(row_hashes(ids), pa.uint64())
    arrays["_tokens"] = pa.array([example.length for _, example in examples], pa.int32())
    arrays["_trained"] = pa.array([example.trained for _, example in examples], pa.int32())
    if signatures is not None:
        arrays["_signature"] = pa.array(list(signatures), pa.list_(pa.uint32()))
    return pa.table(arrays)


def column(parts: list[Part], name: str) -> np.ndarray:
    """One number a row over all parts."""
    values = [part.table().column(name).to_numpy() for part in parts]
    return np.concatenate(values) if values else np.zeros(0, np.uint64)


def write_split(parts: list[Part], counts: np.ndarray, folder: Path) -> None:
    """Write row i of the parts counts[i] times, as a Hugging Face datasets folder. The same rows give the same bytes."""
    if not counts.any():
        return  # an Arrow folder cannot be empty
    folder.mkdir(parents=True)
    writer, sink, shards, written = None, None, [], 0
    schema, at = None, 0
    for part in parts:
        table = part.table()
        table = table.select([name for name in table.column_names if name not in HASHES]).replace_schema_metadata(None)
        mine = counts[at : at + len(table)]
        at += len(table)
        chosen = table.take(pa.array(np.repeat(np.arange(len(table)), mine)))
        if not len(chosen):
            continue
        if writer is None or written > SHARD_BYTES:
            if writer is not None:
                writer.close()
                sink.close()
            schema, written = chosen.schema, 0
            shards.append(folder / f"shard-{len(shards)}")
            sink = pa.OSFile(str(shards[-1]), "wb")
            writer = pa.ipc.new_stream(sink, schema)
        writer.write_table(chosen.combine_chunks())
        written += chosen.nbytes
    writer.close()
    sink.close()
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    # what datasets (5.2) writes beside the data; its own writer would copy all rows once more and name them by a random fingerprint
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": f"{number_of(f'{names} {int(counts.sum())}'):016x}",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {
        "citation": "",
        "description": "",
        "features": datasets.Features.from_arrow_schema(schema).to_dict(),
        "homepage": "",
        "license": "",
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def _facts(path: Path) -> dict:
    with pa.memory_map(str(path)) as file:
        return json.loads(pa.ipc.open_file(file).schema.metadata[b"facts"])


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.rename(path)


def _sync(folder: Path) -> None:
    """Flush to disk, so that the rename cannot survive a power cut that the data did not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
