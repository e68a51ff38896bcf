"""The reference's log-probs computed once, before training, and kept beside the data: DATA/reference/KEY/.

KEY is a hash of the reference's weights, the prepared data and the dtype, so runs that differ in anything else (a sweep over beta or
the learning rate) share them, and others cannot meet them. Pieces of CHUNK pairs are whole or absent: a killed run goes on after the last.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import distributed as dist

from posttrain.common import files
from posttrain.data.prepared import PreparedData, Split
from posttrain.engine.build import free_engine
from posttrain.objectives.answers import answer_sums
from posttrain.parallel.ranks import on_rank_0
from posttrain.recipes.keys import DPORecipe
from posttrain.training.step import my_micro_batches

CHUNK = 4096  # pairs in a file


def attach(recipe: DPORecipe, prepared: PreparedData, weights: str, device: torch.device, build: Callable) -> str:
    """Give both splits the reference's sums, computing what is not there yet with the engine that `build` makes. All ranks.

    Returns a line that says what was done. `weights`: the hash of the reference's weights.
    """
    identity = {"weights": weights, "data": prepared.fingerprint, "dtype": recipe.dtype}
    folder = Path(recipe.dpo_data_dir) / "reference" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    splits = {name: split for name, split in (("train", prepared.train), ("validation", prepared.validation)) if len(split)}
    pieces = {
        folder / f"{name}_{start:08d}.npz": (split, np.arange(start, min(start + CHUNK, len(split))))
        for name, split in splits.items()
        for start in range(0, len(split), CHUNK)
    }
    found = _read(pieces)
    for split in splits.values():
        split.reference_sums, split.reference_folder = np.zeros((len(split), 2, 2)), folder
    for path, sums in found.items():
        split, indices = pieces[path]
        split.reference_sums[indices] = sums
    if missing := [path for path in pieces if path not in found]:
        on_rank_0(lambda: _prepare_folder(folder, identity | {"model": recipe.sft_checkpoint_path}))
        engine = build()
        for path in missing:
            split, indices = pieces[path]
            split.reference_sums[indices] = _compute(recipe, engine, split, indices, device)
            on_rank_0(lambda path=path, sums=split.reference_sums[indices]: _write(path, sums))
        free_engine(engine)
    return f"reference: precomputed in {folder} ({len(missing)} of {len(pieces)} files computed now)"


@torch.no_grad()
def _compute(recipe: DPORecipe, engine, split: Split, indices: np.ndarray, device: torch.device) -> np.ndarray:
    """(n, 2, 2) sums of the n given pairs, which follow each other, on all ranks. All ranks."""
    sums = torch.zeros(len(indices), 2, 2, dtype=torch.float64, device=device)
    for part in my_micro_batches(indices, split.lengths, recipe):
        batch = split.micro_batch(part).to(device)
        sums[torch.from_numpy(part - indices[0]).to(device)] = answer_sums(engine(batch), batch).view(-1, 2, 2)
    dist.all_reduce(sums)  # every pair is on one rank, zero on the others
    return sums.cpu().numpy()


def _read(pieces: dict[Path, tuple[Split, np.ndarray]]) -> dict[Path, np.ndarray]:
    """What is there and whole, as rank 0 sees it. All ranks."""
    return on_rank_0(
        lambda: {path: sums for path, (_, indices) in pieces.items() if path.is_file() and (sums := _load(path, len(indices))) is not None}
    )


def _load(path: Path, count: int) -> np.ndarray | None:
    """The sums of `count` pairs; None where the file does not hold them."""
    try:
        sums = np.load(path)["sums"]
    except (ValueError, EOFError, OSError, KeyError, BadZipFile):  # cut, or not what its own checksum says
        return None
    return sums if sums.shape == (count, 2, 2) and np.isfinite(sums).all() else None


def _prepare_folder(folder: Path, identity: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "identity.json").write_text(json.dumps(identity, indent=2) + "\n")


def _write(path: Path, sums: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, sums=sums)
    files.write_whole(path, buffer.getvalue())  # two runs of a sweep may write the same at once
