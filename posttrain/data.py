"""Prepared data: the folder that data_prep/ writes, and the packed micro-batches that the model sees.

    DIR/manifest.json     what it is: kind, tokenizer and template identity, counts, ledger; written last, so its presence means complete
    DIR/train, DIR/validation   Arrow tables, memory-mapped
    DIR/tokenizer/        the tokenizer that made the ids
    DIR/dropped.jsonl     every row that could not be used, and why; lengths.png draws the lengths

SFT rows: input_ids, labels (IGNORE where not trained), num_trained. DPO rows: prompt, chosen, rejected. Both: source (where the row came
from) and proof (a hash of the texts that its trained tokens must read as; `data_prep/preview.py --check` compares).
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from posttrain.attention import Packing, Segment, copied, pack, to_device
from posttrain.chat import IGNORE

FORMAT = 2
COLUMNS = {"sft": ("input_ids", "labels", "num_trained", "source"), "dpo": ("prompt", "chosen", "rejected", "source")}


class MicroBatch(NamedTuple):
    """One row of T packed tokens. N positions are trained; A answers are told apart (SFT: examples; DPO: chosen, rejected, ...)."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T), from 0 in each example
    packing: Packing
    rows: torch.Tensor  # (N,) row whose hidden state predicts the target
    targets: torch.Tensor | None  # (N,); None: which would be likeliest is asked
    answers: torch.Tensor  # (N,) index of the answer that the target belongs to
    beyond: torch.Tensor  # (N,) 1 where the target lies beyond the length of the pair's other answer, else 0
    num_answers: int
    reference_sums: torch.Tensor | None = None  # (A, 2) the reference's objectives.answer_sums, where they were computed before

    def to(self, device: torch.device) -> "MicroBatch":
        """Copied, where that is a GPU without waiting: from pinned memory."""
        moved = {n: copied(v, device) for n, v in self._asdict().items() if isinstance(v, torch.Tensor)}
        return self._replace(packing=to_device(self.packing, device), **moved)


class Split:
    """One memory-mapped table with the lengths that the plan needs."""

    def __init__(self, path: Path, kind: str, share_prompt: bool):
        self.table = datasets.load_from_disk(str(path))
        self.kind, self.share_prompt = kind, share_prompt
        self.reference_sums: np.ndarray | None = None  # (pairs, 2, 2), see MicroBatch; where they are kept:
        self.reference_folder: Path | None = None
        if kind == "sft":
            self.lengths = self.positions = self.token_counts("input_ids")  # tokens of each example, as packed
            self.trained = self.table.with_format("numpy")["num_trained"][:]
        else:
            prompt, chosen, rejected = (self.token_counts(name) for name in ("prompt", "chosen", "rejected"))
            self.lengths = prompt * (1 if share_prompt else 2) + chosen + rejected
            self.positions = prompt + np.maximum(chosen, rejected)
            self.trained = chosen

    def __len__(self) -> int:
        return len(self.table)

    def micro_batch(self, indices) -> MicroBatch:
        """The examples packed into one row, in the given order; without any, one token that nothing is trained on."""
        builder = RowBuilder()
        for index in indices:
            example = self.table[int(index)]
            if self.kind == "sft":
                builder.add_sequence(example["input_ids"], example["labels"])
            else:
                builder.add_pair(example["prompt"], example["chosen"], example["rejected"], self.share_prompt)
        if not builder.input_ids:
            builder.add_sequence([0], [IGNORE])
            builder.num_answers = 0
        batch = builder.build()
        if self.reference_sums is not None:
            sums = self.reference_sums[np.asarray(indices, dtype=np.int64)]
            batch = batch._replace(reference_sums=torch.from_numpy(sums).view(-1, 2))
        return batch

    @property
    def answer_tokens(self) -> np.ndarray:
        """Trained tokens of each example; of a pair the mean of both answers."""
        return self.trained if self.kind == "sft" else (self.token_counts("chosen") + self.token_counts("rejected")) / 2

    def token_counts(self, column: str) -> np.ndarray:
        """Of a column of token ids, by example."""
        return pc.list_value_length(self.table.data.column(column)).to_numpy().astype(np.int64)


class PreparedData(NamedTuple):
    train: Split
    validation: Split
    manifest: dict

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(int(split.lengths.max()) for split in (self.train, self.validation) if len(split))

    @property
    def fingerprint(self) -> str:
        """Changes when the data is prepared anew from other rows or in another way."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        for split in (self.train, self.validation):
            digest.update(split.positions.tobytes() + split.trained.tobytes())
        return digest.hexdigest()[:16]


def read_manifest(directory: str, make: str = "python data_prep/prepare_sft.py or prepare_dpo.py") -> dict:
    """The manifest of prepared data. Raises as `load` does."""
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no prepared data at {path}. Make it with\n    {make}")
    if not (path / "manifest.json").is_file():
        raise ValueError(f"{path} has no manifest.json: it was not prepared, or not to the end. Make it again with\n    {make}")
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        seen = manifest["format"], manifest["kind"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). Make it again with\n    {make}") from error
    if seen[0] != FORMAT or seen[1] not in COLUMNS:
        raise ValueError(f"{path} holds format {seen[0]}, {seen[1]} data; this code reads format {FORMAT}. Make it again with\n    {make}")
    return manifest


def load(directory: str, kind: str, make: str, share_prompt: bool = True) -> PreparedData:
    """The prepared data in `directory`.

    Raises FileNotFoundError or ValueError, naming the command `make`, where it is missing, half-written or of another kind.
    """
    manifest = read_manifest(directory, make)
    path = Path(directory)
    if manifest["kind"] != kind:
        raise ValueError(f"{path} holds {manifest['kind']} data; this command needs {kind} data. Make it with\n    {make}")
    for name, stored in manifest["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != stored["bytes"]:
            raise ValueError(
                f"{path} is damaged: {name} is not the file of {stored['bytes']:,} bytes that was prepared. Make it again with\n    {make}"
            )
    try:
        splits = [_open(path, name, kind, share_prompt, manifest["counts"][name]) for name in ("train", "validation")]
    except (OSError, KeyError, json.JSONDecodeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). Make it again with\n    {make}") from error
    return PreparedData(*splits, manifest)


def fingerprint_file(path: Path) -> dict:
    """Size and hash of a file, as the manifest holds them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _open(path: Path, name: str, kind: str, share_prompt: bool, count: int) -> Split:
    if not count:
        return _Empty()
    split = Split(path / name, kind, share_prompt)
    if len(split) != count or any(column not in split.table.column_names for column in COLUMNS[kind]):
        raise KeyError(f"{name} has {len(split)} rows of {split.table.column_names}, the manifest says {count} of {COLUMNS[kind]}")
    return split


class _Empty:
    """A split without rows (Arrow folders cannot be empty): nothing to validate on."""

    lengths = positions = trained = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return 0


class RowBuilder:
    """Appends examples to one row. A token at row i is predicted by the hidden state of the row before it in its own example."""

    def __init__(self):
        self.input_ids, self.positions, self.segments = [], [], []
        self.rows, self.targets, self.answers, self.beyond = [], [], [], []
        self.num_answers = 0

    def add_sequence(self, ids: list[int], labels: list[int]) -> None:
        start = self._append(ids, 0)
        trained = [i for i in range(1, len(ids)) if labels[i] != IGNORE]  # an example's first token has nothing to predict it
        self._train([start + i - 1 for i in trained], [labels[i] for i in trained], len(trained))

    def add_pair(self, prompt: list[int], chosen: list[int], rejected: list[int], share_prompt: bool) -> None:
        start = self._append(prompt + chosen, 0)
        last = start + len(prompt) - 1  # the prompt's last row predicts the first token of both answers
        shorter = min(len(chosen), len(rejected))
        self._train(range(last, last + len(chosen)), chosen, shorter)
        if not share_prompt:
            start = self._append(prompt + rejected, 0)
            self._train(range(start + len(prompt) - 1, start + len(prompt) + len(rejected) - 1), rejected, shorter)
            return
        own = self._append(rejected, len(prompt), prefix=(start, start + len(prompt)))
        self._train([last, *range(own, own + len(rejected) - 1)], rejected, shorter)

    def _append(self, ids: list[int], position: int, prefix: tuple[int, int] = (0, 0)) -> int:
        start = len(self.input_ids)
        self.input_ids += ids
        self.positions += range(position, position + len(ids))
        self.segments.append(Segment(start, start + len(ids), *prefix))
        return start

    def _train(self, rows, targets, shorter: int) -> None:
        self.rows += rows
        self.targets += targets
        self.beyond += [int(i >= shorter) for i in range(len(targets))]
        self.answers += [self.num_answers] * len(targets)
        self.num_answers += 1

    def build(self) -> MicroBatch:
        def tensor(values):
            return torch.tensor(values, dtype=torch.int64)

        return MicroBatch(
            tensor(self.input_ids)[None],
            tensor(self.positions)[None],
            pack(self.segments),
            tensor(self.rows),
            tensor(self.targets),
            tensor(self.answers),
            tensor(self.beyond),
            self.num_answers,
        )
