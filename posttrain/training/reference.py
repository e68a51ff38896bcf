"""Computes the reference's log-probs once, before training, and keeps them beside the data, in DATA/reference/KEY/.

KEY is a hash of the reference's weights, the prepared data and the dtype. So runs that differ in anything else, as in a sweep over beta,
share the log-probs, and no other run can read them. They are written in files of CHUNK pairs, each whole or absent: after a kill the same
command computes only those that are missing. Where the data's folder cannot be written, they are kept in RUN/reference/KEY/.
"""

import errno
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist

from posttrain.common import files
from posttrain.data.prepared import PreparedData, Split
from posttrain.engine.update import free_engine
from posttrain.objectives.answers import answer_sums
from posttrain.parallel.ranks import on_rank_0
from posttrain.recipes.keys import DPORecipe
from posttrain.run.resume import CREATING
from posttrain.training.state import my_micro_batches

CHUNK = 4096  # pairs in a file
PAIR_BYTES, MOST_HEADER_BYTES = 2 * 2 * 8, 4096  # of a file of sums: float64 values, and what zip and NumPy write around them
# of a folder of another user's, on a read-only mount, or with a file in its place; a full disk is no reason to write elsewhere
CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


def attach(recipe: DPORecipe, max_tokens: int, prepared: PreparedData, weights: str, device: torch.device, build: Callable) -> str:
    """Set both splits' `reference_sums`; what is not on disk yet is computed with the engine that `build` makes. All ranks.

    `max_tokens` limits a micro-batch, `weights` is the hash of the reference's weights. Returns what was done, for the first screen.
    """
    identity = {"weights": weights, "data": prepared.fingerprint, "dtype": recipe.dtype}
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folders = [Path(place) / "reference" / key for place in (recipe.dpo_data_dir, recipe.out_dir)]
    splits = {name: split for name, split in (("train", prepared.train), ("validation", prepared.validation)) if len(split)}
    pieces = {
        f"{name}_{start:08d}.npz": (split, np.arange(start, min(start + CHUNK, len(split))))
        for name, split in splits.items()
        for start in range(0, len(split), CHUNK)
    }
    found = _read(folders, pieces)
    missing, place, note = [name for name in pieces if name not in found], folders[0], ""
    if missing:
        place, note = on_rank_0(lambda: _prepare_folder(folders, identity | {"model": recipe.sft_checkpoint_path}))
    elif any(folder != place for folder, _ in found.values()):
        place = folders[1]
    for split in splits.values():
        split.reference_sums, split.reference_folder = np.zeros((len(split), 2, 2)), place
    for name, (_, sums) in found.items():
        split, indices = pieces[name]
        split.reference_sums[indices] = sums
    if missing:
        engine = build()
        for name in missing:
            split, indices = pieces[name]
            split.reference_sums[indices] = _compute(
                engine, split, indices, my_micro_batches(indices, split.lengths, max_tokens, recipe.packing), device
            )
            on_rank_0(lambda path=place / name, sums=split.reference_sums[indices]: _write(path, sums))
        free_engine(engine)
    return f"precomputed in {place} ({len(missing)} of {len(pieces)} files computed now{note})"


@torch.no_grad()
def _compute(engine, split: Split, indices: np.ndarray, mine: list[np.ndarray], device: torch.device) -> np.ndarray:
    """Return the answer_sums of n consecutive pairs, (n, 2 answers, 2); `mine` are this rank's micro-batches of them. All ranks."""
    sums = torch.zeros(len(indices), 2, 2, dtype=torch.float64, device=device)
    for part in mine:
        batch = split.micro_batch(part).to(device)
        sums[torch.from_numpy(part - indices[0]).to(device)] = answer_sums(engine(batch), batch).view(-1, 2, 2)
    dist.all_reduce(sums)  # every pair is on one rank, zero on the others
    return sums.cpu().numpy()


def _read(folders: list[Path], pieces: dict[str, tuple[Split, np.ndarray]]) -> dict[str, tuple[Path, np.ndarray]]:
    """Return, for each file that is there and whole, the first folder that has it and its sums, as rank 0 sees them. All ranks."""

    def look() -> dict[str, tuple[Path, np.ndarray]]:
        """Read the files of each folder, the first folder's last."""
        found = {}
        for folder in reversed(folders):
            for name, (_, indices) in pieces.items():
                if (folder / name).is_file() and (sums := _load(folder / name, len(indices))) is not None:
                    found[name] = folder, sums
        return found

    return on_rank_0(look)


def _load(path: Path, count: int) -> np.ndarray | None:
    """Return the sums of `count` pairs, (count, 2, 2); None if the file is cut, damaged, or holds other numbers.

    A file that is larger, or that unpacks to more, is not read: a small one could take all memory.
    """
    most = count * PAIR_BYTES + MOST_HEADER_BYTES
    try:
        if path.stat().st_size > most:
            return None
        with zipfile.ZipFile(path) as entries:
            if any(entry.file_size > most for entry in entries.infolist()):
                return None
        sums = np.load(path)["sums"]
    except Exception:  # cut, or not what its own checksum says; by the bit it is one of a dozen errors of zipfile, zlib and NumPy
        return None
    return sums if sums.shape == (count, 2, 2) and np.isfinite(sums).all() else None


def _prepare_folder(folders: list[Path], identity: dict[str, str]) -> tuple[Path, str]:
    """Make the first folder that can be written, with a file that says what its log-probs belong to; the last one is in the run.

    Returns it, and what to say where it is not the first.
    """
    text, (beside, in_run) = json.dumps(identity, indent=2) + "\n", folders
    try:
        beside.mkdir(parents=True, exist_ok=True)
        files.write_whole(beside / "identity.json", text)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        in_run.mkdir(parents=True, exist_ok=True)
        if not (run := in_run.parents[1]).joinpath("run.json").exists():
            (run / CREATING).touch()  # else a start that fails from here on would leave a folder that is no run
        files.write_whole(in_run / "identity.json", text)
        return in_run, f"; in the run, since {beside.parent} cannot be written: {error.strerror}"
    return beside, ""


def _write(path: Path, sums: np.ndarray) -> None:
    """Write a file of sums, whole or not at all."""
    with files.written_whole(path) as file:  # two runs of a sweep may write the same at once
        np.savez(file, sums=sums)
