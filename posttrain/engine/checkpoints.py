"""Saves and restores training checkpoints, checkpoints/step_000200/: DeepSpeed's files, every rank's random states, and manifest.json.

A save copies the state to host memory and writes it in the background. When all ranks have written, rank 0 writes the manifest (the files'
sizes and checksums, the step, where every parameter lies), flushes it to disk and renames the staging folder: so a folder named step_*
is complete. Only then is `latest` updated and an older checkpoint deleted.
"""

import fcntl
import json
import math
import os
import pickle
import random
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from posttrain.common.errors import first_line
from posttrain.common.files import checksum, sweep, sync_folder, write_whole
from posttrain.common.links import open_own
from posttrain.engine import shards
from posttrain.engine.adam import FLOAT32, STATE_BYTES
from posttrain.engine.checkpoint_folder import FORMAT, file_problem, read_manifest, saved_checkpoints, step_of
from posttrain.engine.writer import BackgroundWriter
from posttrain.operators.saved_form import persistent_buffers
from posttrain.parallel import watchdog
from posttrain.parallel.ranks import gathered, on_rank_0

TOKEN = ".shared."  # begins the names of files by which hosts see that they share the folder


class Found(NamedTuple):
    """A checkpoint that was found undamaged, and its manifest (`facts`)."""

    path: Path
    facts: dict


class Checkpoints:
    """A run's checkpoints: the `kept` newest, and the one with the lowest validation loss. All ranks call every method."""

    def __init__(self, engine, folder: Path, kept: int, say: Callable[[str], None], facts: dict):
        """`say` prints a line; `facts` are repeated in every manifest, so that a checkpoint can be understood without its run."""
        self.engine, self.folder, self.kept, self.say, self.facts = engine, folder, kept, say, facts
        self.writer = BackgroundWriter()
        self.pending: dict | None = None  # the save that is being written

    def save(self, step: int, guard: dict, validation: float | None = None) -> None:
        """Copy the state after `step`, with StepGuard's (`guard`), to host memory and begin to write it; `finish` before the next save.

        Raises ValueError on all ranks for weights that are not finite: they would take the place of good ones.
        """
        assert self.pending is None, self.pending
        watchdog.enter("save")
        if not all(gathered(shards.are_finite(self.engine))):
            there = saved_checkpoints(self.folder)
            older = f"the newest checkpoint, {there[-1]}, is from before" if there else "there is no earlier checkpoint"
            raise ValueError(
                f"after step {step} the weights hold numbers that are not finite, so nothing is saved; {older}. The same command would "
                "come here again: start a new run with a lower --learning_rate"
            )
        name = f"step_{step:06d}"
        staging = self.folder / f"{name}.incomplete"
        on_rank_0(lambda: self._make_room(staging))
        engine, rank = self.engine, dist.get_rank()
        self.writer.beside = {f"random_rank_{rank:05d}.pt": _random_states()}
        if rank == 0 and (buffers := persistent_buffers(engine.module)):
            self.writer.beside[shards.BUFFERS] = buffers
        file = engine.save(self.folder, staging.name, self.writer)
        self.pending = {
            "name": name,
            "fragments": shards.fragments(engine) if engine.zero_stage or rank == 0 else [],
            "file": file,
            "facts": {"step": step, "validation": validation, "guard": guard, "optimizer_step": shards.optimizer_step(engine)},
        }

    @property
    def is_written(self) -> bool:
        """Whether a save is pending whose files this rank has all written, so that `finish` need not wait for this rank."""
        return self.pending is not None and self.writer.is_done

    def finish(self) -> None:
        """Wait until the pending save is on disk, and complete it. Raises OSError on all ranks if a rank could not write."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        watchdog.enter("save")
        while not self.writer.is_done:
            before = self.writer.bytes_written
            self.writer.thread.join(timeout=1)
            if self.writer.bytes_written > before:
                watchdog.enter("save")
        mine = {
            "error": str(self.writer.error or ""),
            "files": self.writer.files,
            "fragments": pending["fragments"],
            "file": pending["file"],
        }
        everyones = gathered(mine)
        final = self.folder / pending["name"]
        if failed := {rank: one["error"] for rank, one in enumerate(everyones) if one["error"]}:
            error = next(iter(failed.values()))
            on_rank_0(lambda: shutil.rmtree(final.with_name(f"{final.name}.incomplete"), ignore_errors=True))
            self._failed(final, f"{error} (ranks {', '.join(map(str, failed))})")
        try:
            on_rank_0(lambda: self._complete(final, pending["facts"], everyones))
        except OSError as error:
            self._failed(final, str(error))
        self.say(f"saved {final}")

    def _failed(self, final: Path, why: str) -> NoReturn:
        raise OSError(f"{final} could not be written: {why}. Earlier checkpoints are intact: make room, and the same command continues")

    def _complete(self, final: Path, facts: dict, everyones: list[dict]) -> None:
        """Write the manifest and rename the staging folder to `final`. `everyones`: each rank's files and fragments."""
        staging = final.with_name(f"{final.name}.incomplete")
        files = {name: value for one in everyones for name, value in one["files"].items()}
        zero = self.engine.zero_stage
        parts = everyones if zero else everyones[:1]
        state = {
            "zero_stage": zero,
            "optimizer_step": facts["optimizer_step"],
            "shapes": shards.shapes(self.engine),
            "files": [one["file"] for one in parts],
            "fragments": [one["fragments"] for one in parts],
            "has_buffers": shards.BUFFERS in files,
        }
        manifest = {"format": FORMAT, **facts, "world_size": len(everyones), **self.facts, "state": state, "files": files}
        write_whole(staging / "manifest.json", json.dumps(manifest | {"checksum": checksum(manifest)}) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        sync_folder(self.folder)
        write_whole(self.folder / "latest", final.name)
        self._delete_old()

    def _delete_old(self) -> None:
        """Write `best`, and delete all checkpoints but the newest `kept` and the best."""
        there = saved_checkpoints(self.folder)
        losses = {path: _validation_loss(path) for path in there}
        measured = [path for path in there if losses[path] is not None and math.isfinite(losses[path])]
        best = min(measured, key=losses.get, default=None)
        if best:
            write_whole(self.folder / "best", best.name)
        for old in there[: -self.kept]:
            if old != best:
                self._delete(old)

    def _delete(self, old: Path) -> None:
        """Delete a checkpoint, renaming it first: a half-deleted one must not look complete."""
        doomed = old.with_name(f"{old.name}.incomplete")
        try:
            old.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            self.say(f"warning  {old} could not be deleted: {error}")

    def newest(self, before: float = math.inf) -> Found | None:
        """Returns the newest undamaged checkpoint with no applied step from `before` on, or None. Raises ValueError if all are damaged."""
        names = on_rank_0(lambda: [path.name for path in saved_checkpoints(self.folder)])
        latest = on_rank_0(lambda: os.path.lexists(self.folder / "latest"))  # written with the first checkpoint
        usable = 0
        for path in (self.folder / name for name in reversed(names)):
            facts, problem = _verified(path)
            if problem:
                self.say(f"warning  {path} is damaged, and is not used: {problem}")
            usable += not problem
            if not problem and facts["guard"]["last_applied"] < before:
                return Found(path, facts)
        if (names or latest) and not usable:
            raise ValueError(
                f"{'none of the checkpoints' if names else 'no checkpoint is left'} in {self.folder}{' can be used' if names else ''}, so "
                "the run would start again at step 1. Restore one of them; or move the folder away, and the same command starts from the "
                "beginning"
            )
        return None

    def restore(self, found: Found) -> int:
        """Load a checkpoint into the engine, on any number of ranks and at any ZeRO stage. Returns the step after which it was saved."""
        shards.restore(self.engine, shards.Saved(found.path, found.facts["state"]))
        if found.facts["world_size"] == dist.get_world_size():
            _restore_random_states(found.path / f"random_rank_{dist.get_rank():05d}.pt")
        return found.facts["step"]

    def forget_after(self, step: int) -> None:
        """Delete unfinished checkpoints; rename those after `step`, where the run continues, to *.damaged: unusable or outdated.

        What follows a save, and an earlier start may have been killed before it, is done as well: `latest`, `best`, deleting old ones.
        """

        def set_aside():
            if not self.folder.is_dir():
                return
            sweep(self.folder)
            for path in saved_checkpoints(self.folder):
                if step_of(path) > step:
                    aside = path.with_name(f"{path.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
            if left := saved_checkpoints(self.folder):
                write_whole(self.folder / "latest", left[-1].name)
            best = self.folder / "best"
            if best.is_file() and not (self.folder / best.read_text(encoding="utf-8", errors="replace")).is_dir():
                best.unlink()
            self._delete_old()

        on_rank_0(set_aside)

    def bytes_of_one(self) -> int:
        """Returns the size of a checkpoint in bytes, all ranks together: the weights, and float32 master weights with two moments."""
        dtype, stage = next(self.engine.module.parameters()).dtype, self.engine.zero_stage
        weights = 0 if stage == 3 else dtype.itemsize
        alone = stage == 0 and dtype == torch.float32  # the weights are the master weights
        return shards.count(self.engine.module) * (weights + STATE_BYTES - (FLOAT32 if alone else 0))

    def check_space_for(self, saves: int, weights: int) -> None:
        """Raises OSError if the disk cannot hold the kept checkpoints of `saves` saves, and a result of `weights` bytes."""

        def check():
            there = len(saved_checkpoints(self.folder)) if self.folder.is_dir() else 0
            most = min(saves, self.kept + 2)  # + 2: the best one, and one being written
            needed = max(0, most - there) * self.bytes_of_one() + weights
            self._refuse_unless_free(needed, f"{most} checkpoints and the result need", self.folder.parent)

        on_rank_0(check)

    def lock(self) -> None:
        """Lock the run's directory until this process ends, and remove what an earlier one that was killed left half-written there.

        Raises ValueError if another process has locked it.
        """

        def take():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.held = open(open_own(self.folder.parent / ".lock"), "r+b")  # noqa: SIM115
            try:
                fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.folder.parent} is in use by another process of this run; wait for it, or stop it") from None
            sweep(self.folder.parent)
            sweep(self.folder)
            for token in self.folder.parent.glob(f"{TOKEN}*"):
                token.unlink()

        on_rank_0(take)

    def check_shared(self) -> None:
        """Raises ValueError unless all hosts see the same folder: else each would write checkpoints that only it can read."""
        place = self.folder.parent
        token = on_rank_0(lambda: _touch_token(place))
        deadline = time.monotonic() + 10  # a network file system may show a new file late
        while not (seen := (place / token).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        everyones = gathered((socket.gethostname(), seen))
        on_rank_0(lambda: (place / token).unlink())
        if blind := sorted({host for host, seen in everyones if not seen}):
            raise ValueError(
                f"{place.resolve()} is not the same folder on all hosts: {', '.join(blind)} does not see what rank 0 on {everyones[0][0]} "
                "writes there. Give an --out_dir on a file system that the hosts share"
            )

    def _make_room(self, staging: Path) -> None:
        """Create an empty staging folder. Raises OSError if the disk has too little room for a checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        self._refuse_unless_free(self.bytes_of_one(), "a checkpoint needs", self.folder)
        staging.mkdir()

    def _refuse_unless_free(self, needed: int, what: str, place: Path) -> None:
        """Raises OSError unless `needed` bytes are free on the disk of `place`; `what` begins the message."""
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise OSError(
                f"{self.folder}: {what} {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free. Nothing was deleted: make room, or "
                "lower keep_checkpoints, and give the same command again"
            )


def _touch_token(place: Path) -> str:
    place.mkdir(parents=True, exist_ok=True)
    token = f"{TOKEN}{uuid.uuid4().hex}"
    (place / token).touch()
    return token


def _validation_loss(path: Path) -> float | None:
    """Returns a checkpoint's validation loss; None if it has none, or its manifest is damaged."""
    try:
        return read_manifest(path)["validation"]
    except ValueError:
        return None


def _verified(path: Path) -> tuple[dict, str | None]:
    """Read a checkpoint's manifest and check its files, each rank a share. Returns the manifest, and a problem or None. All ranks."""
    try:
        facts, problem = read_manifest(path), None
    except ValueError as error:
        facts, problem = {}, str(error)
    files = sorted(facts.get("files", {}).items())
    for name, expected in files[dist.get_rank() :: dist.get_world_size()]:
        problem = problem or file_problem(path, name, expected)
    return facts, next((one for one in gathered(problem) if one), None)


def _random_states() -> dict:
    """Returns this rank's random states. Our training code uses none that outlives a step; a model's own code, or a kernel's, might."""
    kind, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, torch.from_numpy(keys.copy()), *rest)}
    return states | {"device": get_accelerator().get_rng_state(), "kind": get_accelerator().device_name()}


def _restore_random_states(path: Path) -> None:
    """Set this rank's random states from a file of `_random_states`; the device's only if it is of the same kind. Raises ValueError."""
    try:
        states = torch.load(path, weights_only=True)
        torch.set_rng_state(states["torch"])
        if states["kind"] == get_accelerator().device_name():
            get_accelerator().set_rng_state(states["device"])
        random.setstate(states["python"])
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, keys.numpy(), *rest))
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} holds no random states ({first_line(error)}): move {path.parent} away, and the run goes on from the checkpoint before"
        ) from error
