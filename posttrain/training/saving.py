"""Decides after every step whether a run is saved, and whether it stops early."""

import math
import time

from torch import distributed as dist

from posttrain.engine.checkpoints import Checkpoints
from posttrain.parallel import watchdog
from posttrain.parallel.launched import read_launch
from posttrain.parallel.ranks import gathered
from posttrain.parallel.stopping import StopRequest
from posttrain.run.directory import Run
from posttrain.training.state import Training
from posttrain.training.step import Questions

WRITE_SPEED = 2**28  # bytes a second that a disk is expected to write, until a save was timed


class Saving:
    """Saves a run at the recipe's intervals, and stops it in order. All ranks call every method."""

    def __init__(self, training: Training, run: Run, steps: int):
        """`steps` is the run's last step."""
        self.training, self.run, self.steps = training, run, steps
        facts = run.facts | {"recipe": run.as_resolved}
        self.checkpoints = Checkpoints(training.engine, run.path / "checkpoints", training.recipe.keep_checkpoints, run.say, facts)
        self.questions: Questions = {}  # what each rank is asked at the end of every step
        self.last_save, self.longest_step = time.monotonic(), 0.0
        self.save_seconds = self.checkpoints.bytes_of_one() / WRITE_SPEED

    def resume(self) -> int:
        """Load the newest whole checkpoint, for replay_step the newest before it; returns the step that it was saved after, or 0."""
        recipe = self.training.recipe
        if not recipe.only_looks:
            self.checkpoints.lock()
        found = self.checkpoints.newest(before=recipe.replay_step or math.inf)
        if found is None and self.training.engine.module.is_from_checkpoint:
            raise ValueError(f"the model at {recipe.model_path} is gone, and there is no checkpoint before step {recipe.replay_step}")
        if found is None:
            return 0
        done = self.checkpoints.restore(found)
        self.training.guard.restore(found.facts["guard"])
        was = found.facts["world_size"], found.facts["state"]["zero_stage"]
        now = dist.get_world_size(), self.training.engine.zero_stage
        change = "" if was == now else f", from {was[0]} ranks at ZeRO-{was[1]} to {now[0]} at ZeRO-{now[1]}"
        self.run.say(f"continuing after step {done}{change}")
        return done

    def begin(self, done: int, result_bytes: int) -> None:
        """Prepare for the steps after `done`: check disk space and that all hosts see one folder, then listen for signals.

        `result_bytes` is the size of final/.
        """
        recipe = self.training.recipe
        interval = recipe.save_interval or self.steps
        if self.steps > done:
            self.checkpoints.check_space_for(math.ceil(self.steps / interval) - done // interval, result_bytes)
        self.checkpoints.check_shared()
        self.checkpoints.forget_after(done)
        self.stop = StopRequest(recipe.time_limit, read_launch().launcher)
        self.questions = {
            "stop": lambda: self.stop.reason is not None,
            "written": lambda: self.checkpoints.is_written,
            "save": lambda: dist.get_rank() == 0 and 0 < recipe.save_seconds <= time.monotonic() - self.last_save,
        }

    def after(self, step: int, yes: dict[str, int], validation: float | None, seconds: float) -> None:
        """Save if a checkpoint is due after `step`, which took `seconds`; `yes` is how many ranks said yes to each of `questions`."""
        recipe = self.training.recipe
        self.longest_step = max(self.longest_step, seconds)  # validation included
        self.stop.expect(self.longest_step, self.save_seconds)
        is_last = step == self.steps
        is_due = yes["stop"] or yes["save"] or is_last or (recipe.save_interval and step % recipe.save_interval == 0)
        if is_due or yes["written"] == dist.get_world_size():
            self._finish()
        if is_due:
            self.last_save = time.monotonic()
            self.checkpoints.save(step, self.training.guard.state(), validation)
        if is_last or yes["stop"]:
            self._finish()

    def say_stopped(self, step: int) -> None:
        """Print why the run stopped, and how to go on."""
        watchdog.enter("export")  # what follows may take long: logs are closed, uploads ended
        why = ", ".join(f"{reason} (rank {rank})" for rank, reason in enumerate(gathered(self.stop.reason)) if reason)
        self.run.say(f"stopped after step {step}: {why}. All is saved; the same command goes on with step {step + 1}")

    def save_now(self, step: int) -> None:
        """Save, and wait until all is written."""
        self._finish()
        self.checkpoints.save(step, self.training.guard.state())
        self._finish()

    def _finish(self) -> None:
        """Wait until the checkpoint that is being written is whole, if there is one."""
        if self.checkpoints.pending is None:
            return
        self.run.sync()
        self.checkpoints.finish()
        self.save_seconds = max(self.save_seconds, time.monotonic() - self.last_save)
