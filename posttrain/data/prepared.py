"""Prepared data: the folder that data_prep/ writes, and the packed micro-batches that the model sees.

    DIR/manifest.json     what it is: kind, tokenizer and template identity, counts, ledger; written last, so its presence means complete
    DIR/train, DIR/validation   Arrow tables, memory-mapped; datasets.load_from_disk reads them
    DIR/tokenizer/        the tokenizer that made the ids
    DIR/dropped.jsonl     every row that could not be used, and why; lengths.png draws the lengths

SFT rows: input_ids, labels (IGNORE where not trained), num_trained. DPO rows: prompt, chosen, rejected. Both: source (where the row came
from) and proof (a hash of the texts that its trained tokens must read as; `data_prep/preview.py --check` compares).
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from posttrain.common.errors import reason, shown
from posttrain.common.files import read_object
from posttrain.common.links import refuse_links
from posttrain.data.manifest import again, read_manifest
from posttrain.data.packing import MicroBatch, RowBuilder
from posttrain.data.parts import IGNORE

TOKENS = {"sft": ("input_ids", "labels"), "dpo": ("prompt", "chosen", "rejected")}  # columns of int32 lists
COLUMNS = {"sft": (*TOKENS["sft"], "num_trained", "source"), "dpo": (*TOKENS["dpo"], "source")}


class Split:
    """A memory-mapped table of examples, with the numbers of tokens that the plan of batches needs."""

    def __init__(self, table: pa.Table, kind: str, share_prompt: bool):
        self.table = table
        self.kind, self.share_prompt = kind, share_prompt
        self.reference_sums: np.ndarray | None = None  # (pairs, 2, 2), see MicroBatch
        self.reference_folder: Path | None = None  # where they are kept
        if kind == "sft":
            self.lengths = self.positions = self.token_counts("input_ids")  # tokens of each example, as packed
            self.trained = self.table.column("num_trained").to_numpy().astype(np.int64)  # its bytes are in the fingerprint
        else:
            prompt, chosen, rejected = (self.token_counts(name) for name in ("prompt", "chosen", "rejected"))
            self.lengths = prompt * (1 if share_prompt else 2) + chosen + rejected
            self.positions = prompt + np.maximum(chosen, rejected)
            self.trained = chosen

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict:
        """Return an example's columns by name, as Python values."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no example {index} of {len(self)}")
        return self.table.slice(int(index), 1).to_pylist()[0]

    def micro_batch(self, indices) -> MicroBatch:
        """Pack the examples into one row, in the given order; without any the row is one token, and nothing is trained."""
        builder = RowBuilder()
        columns = [self.table.column(name) for name in TOKENS[self.kind]]
        for index in indices:
            row = (column[int(index)].values.to_numpy() for column in columns)  # views of the memory-mapped file
            if self.kind == "sft":
                builder.add_sequence(*row)
            else:
                builder.add_pair(*row, self.share_prompt)
        if not builder.segments:
            builder.add_sequence([0], [IGNORE])
            builder.answer_lengths.clear()
        batch = builder.build()
        if self.reference_sums is not None:
            sums = self.reference_sums[np.asarray(indices, dtype=np.int64)]
            batch = batch._replace(reference_sums=torch.from_numpy(sums).view(-1, 2))
        return batch

    @property
    def answer_tokens(self) -> np.ndarray:
        """How many tokens of each example are trained; for a pair the mean of both answers."""
        return self.trained if self.kind == "sft" else (self.token_counts("chosen") + self.token_counts("rejected")) / 2

    def token_counts(self, column: str) -> np.ndarray:
        """How many tokens each example has in a column of token ids."""
        return pc.list_value_length(self.table.column(column)).to_numpy().astype(np.int64)


class PreparedData(NamedTuple):
    """What load_prepared finds in a folder."""

    train: Split
    validation: Split
    manifest: dict

    @property
    def system_prompt(self) -> str | None:
        """What conversations without a system message were given."""
        return self.manifest["options"].get("system_prompt")

    @property
    def longest(self) -> int:
        """How many tokens the longest example has."""
        return max(int(split.lengths.max()) for split in (self.train, self.validation) if len(split))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when the data is prepared anew from other rows or in another way."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        for split in (self.train, self.validation):
            digest.update(split.positions.tobytes() + split.trained.tobytes())
        return digest.hexdigest()[:16]


def load_prepared(directory: str, kind: str, make: str, share_prompt: bool = True, checksums: bool = True) -> PreparedData:
    """The prepared data in `directory`; without share_prompt a DPO prompt counts, and is packed, once for each answer.

    `checksums`: read all files once, and compare them with what was written.

    Raises FileNotFoundError or ValueError, naming the command `make`, where it is missing, half-written or of another kind; ValueError for
    a link out of it, as DPO writes the reference's log-probs there. Tables may be such links: they are what the manifest records.
    """
    manifest, path = read_manifest(directory, make, kind), Path(directory)
    refuse_links(path, (".arrow",))
    make = again(manifest, f"{directory}_again") or make
    for name, stored in manifest["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != stored["bytes"]:
            raise ValueError(
                f"{path} is damaged: {name} is not the file of {stored['bytes']:,} bytes that was prepared. Make it again with\n    {make}"
            )
        if checksums and fingerprint_file(path / name) != stored:
            raise ValueError(f"{path} is damaged: {name} is not what was prepared (its checksum differs). Make it again with\n    {make}")
    try:
        splits = [_open(path / name, kind, share_prompt, manifest) for name in ("train", "validation")]
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:  # by what is damaged, and how
        raise ValueError(f"{path} is damaged ({reason(error)}). Make it again with\n    {make}") from error
    return PreparedData(*splits, manifest)


def memory_mapped(files: list[Path]) -> pa.Table:
    """The rows of a Hugging Face datasets folder's files, which stay on disk until they are read.

    datasets.load_from_disk gives the same, but importing datasets takes two seconds, which every rank would wait at every start.
    """
    return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files)


def fingerprint_file(path: Path) -> dict:
    """Size and hash of a file, as the manifest holds them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _open(folder: Path, kind: str, share_prompt: bool, manifest: dict) -> Split:
    """The split in that folder. Raises KeyError unless it has the columns of its kind and as many rows as the manifest says."""
    if not (count := manifest["counts"][folder.name]):
        return _Empty()
    split = Split(memory_mapped(_recorded_files(folder, manifest["files"])), kind, share_prompt)
    if len(split) != count or any(column not in split.table.column_names for column in COLUMNS[kind]):
        columns = split.table.column_names
        raise KeyError(f"{folder.name} has {len(split)} rows of {columns}, the manifest says {count} of {COLUMNS[kind]}")
    return split


def _recorded_files(folder: Path, recorded: dict[str, dict]) -> list[Path]:
    """The files of a split that the manifest records. Raises ValueError unless state.json, which datasets goes by, names the same."""
    state = folder / "state.json"
    named = [file["filename"] for file in read_object(state).get("_data_files") or []]
    if not named:
        raise ValueError(f"{state} names no files")
    expected = sorted(path.name for path in map(PurePosixPath, recorded) if path.parent == PurePosixPath(folder.name))
    if named != expected:
        raise ValueError(f"{state} names {shown(named)}, which are not the files that manifest.json records")
    return [folder / name for name in expected]


class _Empty:
    """A split without rows, for which there is no Arrow folder: nothing to validate on."""

    lengths = positions = trained = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return 0
