"""A run is a directory: recipe, metrics, TensorBoard events, checkpoints and the final model. Also the terminal and the way out.

runs/NAME/recipe.yaml       the resolved recipe; usable as RECIPE.yaml
runs/NAME/run.json          kind, plan version, how global_batch_size was given, versions, what the run was extended by,
                            and what max_tokens_per_gpu: auto has found
runs/NAME/model/            what final/ holds besides weights, so that a checkpoint alone can be made a model of
runs/NAME/metrics.jsonl     one object a line: step, split and metrics, named as in TensorBoard; null is a value that is not finite
runs/NAME/bad_batches.jsonl steps that were not applied: why, and the loss of each example (weight 0: only tried for memory, at step 1)
runs/NAME/checkpoints/      step_000200/ ... to go on from
runs/NAME/final/            the result, a Hugging Face folder
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed as dist
from torch.utils.tensorboard import SummaryWriter

from posttrain import stopping, storage, watchdog
from posttrain.batches import PLAN_VERSION
from posttrain.config import Recipe

# Changing these between two starts of a run changes speed, memory or what is shown, never the curve.
MAY_CHANGE = {
    "out_dir",  # the same directory may have moved, or be spelt another way
    "max_tokens_per_gpu",
    "ds_config",
    "activation_checkpointing",
    "compile",
    "kernels",
    "share_prompt",
    "packing",
    "reference",
    "replay_step",
    "eval_interval",
    "eval_iters",
    "eval_only",
    "log_interval",
    "save_interval",
    "save_seconds",
    "keep_checkpoints",
    "time_limit",
    "watchdog_seconds",
    "extend",
    "checks",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "batch_size",
    "gradient_accumulation_steps",
}

MISTAKE = 2  # exit code: the command or what it names is wrong, and would be again
CREATING = ".creating"  # there while a run is created: a crash then leaves no run, and the same command begins anew
LENGTH = {"max_iters", "epochs", "lr_decay_iters"}  # what --extend may change


class _Terminal(Console):
    """Where the terminal has gone (a closed pipe, a lost connection) the run goes on without: the files hold everything."""

    def print(self, *objects, **settings) -> None:
        try:
            super().print(*objects, **settings)
        except OSError:  # a lost terminal gives EIO
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Terminal(highlight=False, soft_wrap=True)


def resolve(recipe: Recipe, kind: str, world_size: int) -> Recipe:
    """The recipe with global_batch_size settled, checked against the run that out_dir may already hold. Writes nothing."""
    form = {"batch_size": recipe.batch_size, "gradient_accumulation_steps": recipe.gradient_accumulation_steps}
    batch = recipe.global_batch_size or (recipe.batch_size or 1) * (recipe.gradient_accumulation_steps or 1) * world_size
    out_dir = Path(recipe.out_dir)
    if (out_dir / "run.json").is_file():
        stored = json.loads((out_dir / "run.json").read_text())
        if stored["kind"] != kind:
            raise ValueError(f"{out_dir} holds a {stored['kind']} run; give another --out_dir")
        if stored["plan_version"] != PLAN_VERSION:
            raise ValueError(
                f"{out_dir} was made with plan version {stored['plan_version']}, this is {PLAN_VERSION}; finish it with that code"
            )
        # a key that is newer than the run had its default then
        was = {name: field.default for name, field in type(recipe).model_fields.items() if not field.is_required()}
        was |= yaml.safe_load((out_dir / "recipe.yaml").read_text())
        if recipe.global_batch_size is None and stored["batch_form"] == form:
            batch = was["global_batch_size"]  # set once, when the run was created, whatever the number of GPUs is now
        recipe = _keep_schedule(recipe.model_copy(update={"global_batch_size": batch}), was, stored)
        changed = {name for name, value in recipe.model_dump().items() if name not in MAY_CHANGE and was.get(name) != value}
        if recipe.extend:
            changed -= LENGTH
        if changed:
            lines = [f"    {name}: {was.get(name)!r} -> {getattr(recipe, name)!r}" for name in recipe.model_dump() if name in changed]
            raise ValueError(
                f"{out_dir} holds a run of another recipe, which goes on only as it began:\n" + "\n".join(lines) + "\n"
                "Undo these changes, or start a new run with another --out_dir"
                + (". To go on beyond the run's end, add --extend" if changed <= LENGTH else "")
            )
    elif recipe.extend:
        raise ValueError(f"--extend makes a run longer, and {out_dir} is not a run: leave --extend out, or name the run's --out_dir")
    elif out_dir.exists() and not (out_dir / CREATING).exists() and not all(path.name.startswith(".") for path in out_dir.iterdir()):
        raise ValueError(f"{out_dir} exists, is not empty and is not a run; give another --out_dir")
    return recipe.model_copy(update={"global_batch_size": batch})


def _keep_schedule(recipe: Recipe, was: dict, stored: dict) -> Recipe:
    """A run that is extended keeps its learning rates up to the old end; the steps after it need some, too."""
    if stored.get("extended") and recipe.lr_decay_iters is None:
        recipe = recipe.model_copy(update={"lr_decay_iters": was["lr_decay_iters"]})
    if not recipe.extend or not recipe.decay_lr or all(getattr(recipe, name) == was[name] for name in LENGTH):
        return recipe
    if recipe.lr_decay_iters in (None, was["lr_decay_iters"]):
        end = was["lr_decay_iters"] or stored["total_steps"]
        if not recipe.min_lr:
            raise ValueError(
                f"the learning rate of {recipe.out_dir} is 0 after step {end}: give --lr_decay_iters=N with --extend, the step at which "
                "the cosine now reaches min_lr"
            )
        return recipe.model_copy(update={"lr_decay_iters": end})
    return recipe


def already_finished(recipe: Recipe, rank: int) -> bool:
    """Whether final/ is there, which is written last and whole, for as many steps as the recipe says. Says so on rank 0."""
    final = Path(recipe.out_dir) / "final"
    if recipe.only_looks or not final.is_dir():
        return False
    if json.loads((Path(recipe.out_dir) / "run.json").read_text()).get("finished") != _length(recipe):
        return False
    if rank == 0:
        console.print(f"{recipe.out_dir} is finished: {final}. Start another run with another --out_dir", markup=False)
    return True


def _extension(recipe: Recipe) -> dict[str, list]:
    """What --extend changes in the run that is there: old and new value by name."""
    was = yaml.safe_load((Path(recipe.out_dir) / "recipe.yaml").read_text())
    return {name: [was.get(name), getattr(recipe, name)] for name in sorted(LENGTH) if was.get(name) != getattr(recipe, name)}


def _length(recipe: Recipe) -> dict:
    return {name: getattr(recipe, name) for name in sorted(LENGTH)}


class Run:
    """The run's directory on rank 0; on other ranks every method does nothing."""

    def __init__(self, recipe: Recipe, kind: str, rank: int, inputs: dict[str, str]):
        """`inputs`: fingerprints of what the recipe names by path, and what may therefore have changed since the run began."""
        self.path, self.rank, self.recipe = Path(recipe.out_dir), rank, recipe
        self.final = self.path / "final"
        self.settled = recipe.model_dump() | {"batch_size": None, "gradient_accumulation_steps": None, "extend": False}
        packages = {name: version(name) for name in ("posttrain", "deepspeed", "torch", "transformers")}
        self.facts = {"kind": kind, "plan_version": PLAN_VERSION, "inputs": inputs, "packages": packages}
        self.progress = self.tensorboard = self.wandb = None
        self.fitted: dict | None = None  # what max_tokens_per_gpu: auto has found, see fit.py
        if rank == 0 and (self.path / "run.json").exists():
            stored = json.loads((self.path / "run.json").read_text())["inputs"]
            if stored.keys() != inputs.keys():
                raise ValueError(
                    f"{self.path} was begun by another version of this code, which identified its inputs in another way; finish it with "
                    "that version, or give another --out_dir"
                )
            if changed := [name for name, value in inputs.items() if stored[name] != value]:
                raise ValueError(
                    f"{' and '.join(changed)} changed since {self.path} began, although the paths are the same: going on would mix two "
                    "runs. Put back what it began with, or start a new run with another --out_dir"
                )

    def _create(self, total_steps: int, describe_model: Callable[[Path], None]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / CREATING).touch()
        (self.path / "model").mkdir(exist_ok=True)
        describe_model(self.path / "model")
        storage.write_whole(self.path / "recipe.yaml", yaml.safe_dump(self.settled, sort_keys=False))
        form = {name: getattr(self.recipe, name) for name in ("batch_size", "gradient_accumulation_steps")}
        own = {"batch_form": form, "total_steps": total_steps, "wandb_id": uuid.uuid4().hex[:8]}
        storage.sync_files(self.path / "model")
        storage.write_whole(
            self.path / "run.json", json.dumps(self.facts | own, indent=2) + "\n"
        )  # last: its presence makes the folder a run
        (self.path / CREATING).unlink()

    def start(self, first_step: int, total_steps: int, describe_model: Callable[[Path], None]) -> None:
        """Open the logs at `first_step`; what an earlier start wrote from there on is cut off, so the record has no seam.

        `describe_model` writes what belongs to the model besides weights into a folder, for a new run.
        """
        if self.rank:
            return
        if not (self.path / "run.json").exists():
            self._create(total_steps, describe_model)
        elif change := _extension(self.recipe):
            storage.write_whole(self.path / "recipe.yaml", yaml.safe_dump(self.settled, sort_keys=False))
            self._update(extended=[{"from_step": first_step, **change}], total_steps=total_steps)
        if self.fitted:
            self._update(fitted=self.fitted)
        if self.recipe.checks == "off":
            self._update(unchecked_from_steps=[first_step])
        for name in ("metrics.jsonl", "bad_batches.jsonl"):
            if (self.path / name).exists():
                kept = [
                    line for line in (self.path / name).read_text().splitlines() if 1 < first_step > _step_of(line)
                ]  # at step 1 nothing
                storage.write_whole(self.path / name, "".join(line + "\n" for line in kept))
        self.metrics_file = (self.path / "metrics.jsonl").open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(self.path), purge_step=first_step if first_step > 1 else 0)
        self.tensorboard.add_text("recipe", f"```yaml\n{(self.path / 'recipe.yaml').read_text()}\n```")
        if self.recipe.wandb_log:
            self.wandb = _start_wandb(self.recipe, json.loads((self.path / "run.json").read_text())["wandb_id"])
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.percentage:.0f}% | time left"), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console)
            self.bar = self.progress.add_task("", total=total_steps, completed=first_step - 1)
            self.progress.start()
        self.total_steps, self.step_seconds = total_steps, []

    def _update(self, **changes) -> None:
        """Write into the run how it went on otherwise than it began; lists grow."""
        facts = json.loads((self.path / "run.json").read_text())
        for name, value in changes.items():
            facts[name] = [*facts.get(name, []), *value] if isinstance(value, list) else value
        storage.write_whole(self.path / "run.json", json.dumps(facts, indent=2) + "\n")

    def log(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """One record, under the same names in metrics.jsonl, TensorBoard (split/name) and wandb."""
        if self.rank:
            return
        self.metrics_file.write(json.dumps({"step": step, "split": split, **_finite(metrics)}) + "\n")
        for name, value in metrics.items():
            self.tensorboard.add_scalar(f"{split}/{name}", value, step)
        if self.wandb:
            self.wandb.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def has(self, step: int, split: str) -> bool:
        """Whether the log holds a record."""
        records = storage.read_json_lines(self.path / "metrics.jsonl")
        return any(record["step"] == step and record["split"] == split for record in records)

    def step_line(self, step: int, metrics: dict[str, float]) -> None:
        if self.rank:
            return
        self.step_seconds.append(metrics["step_ms"] / 1000)
        if self.progress:
            self.progress.update(self.bar, completed=step)
        if step % self.recipe.log_interval and step != self.total_steps:
            return
        recent = self.step_seconds[-20:]
        left = (self.total_steps - step) * sum(recent) / len(recent)
        parts = [f"step {step}/{self.total_steps}", f"loss {metrics['loss']:.4f}"]
        if "rewards/margins" in metrics:
            parts.append(f"margin {metrics['rewards/margins']:.3f}  accuracy {metrics['rewards/accuracies']:.2f}")
        parts += [f"lr {metrics['learning_rate']:.2e}", f"{metrics['step_ms']:.0f} ms", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
        self.say(" | ".join(parts) + ("" if self.progress else f" | {_duration(left)} left"))

    def bad_batch(self, step: int, reason: str, metrics: dict[str, float], examples: list[dict]) -> None:
        """Record a step that was not applied."""
        if self.rank:
            return
        numbers = _finite({name: metrics[name] for name in ("loss", "grad_norm")})
        facts = {"step": step, "reason": reason, **numbers, "examples": examples}
        with (self.path / "bad_batches.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def say(self, text: str) -> None:
        if self.rank == 0:
            console.print(text, markup=False)

    def sync(self) -> None:
        """Put the logs on the disk: what a checkpoint follows must not be lost where the checkpoint is not."""
        if self.rank == 0:
            os.fsync(self.metrics_file.fileno())
            self.tensorboard.flush()

    def finished(self) -> None:
        """Note that final/ is there, and for how long a run."""
        if self.rank == 0:
            self._update(finished=_length(self.recipe))

    def close(self) -> None:
        if self.rank or self.tensorboard is None:
            return
        if self.progress:
            self.progress.stop()
        self.metrics_file.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def main(script: Callable[[], None]) -> None:
    """Run a script's main function on this rank, and leave. A user's mistake ends with one message from rank 0 and a non-zero exit on all.

    Leaving skips the interpreter's shutdown: there a process group's threads may end in std::terminate (seen with gloo, torch 2.13), or
    hang where a peer is gone, although all work is done.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        script()
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        _fail(rank, f"error: {error}", traceback.format_exc(), MISTAKE if isinstance(error, ValueError) else 1)
    except Exception:
        details = traceback.format_exc()
        if gone := watchdog.explain():  # what failed here is what another rank's end has caused
            watchdog.say(gone)
            os._exit(watchdog.LOST)
        _fail(rank, details, "")
    if dist.is_initialized():
        dist.barrier()
        watchdog.close()
        dist.barrier()
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        stopping.tell_that_all_is_well()
    os._exit(0)


def _fail(rank: int, message: str, details: str, code: int = 1) -> NoReturn:
    """Rank 0 speaks. Others mostly failed alike and are ended by the launcher while they wait; one that failed alone speaks after all."""
    watchdog.fall_silent()
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"rank {rank}: {message}"
    watchdog.say(message)
    if details and os.environ.get("POSTTRAIN_TRACEBACK"):
        watchdog.say(details)
    os._exit(code)


def _start_wandb(recipe: Recipe, identity: str):
    """The same Weights & Biases run at every start; steps that it has already are not logged twice."""
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb_log=True needs the wandb package: pip install wandb") from None
    name = recipe.wandb_run_name or Path(recipe.out_dir).name
    settings = {"project": recipe.wandb_project, "name": name, "dir": recipe.out_dir, "config": recipe.model_dump()}
    return wandb.init(**settings, id=identity, resume="allow")


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no nan."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _step_of(line: str) -> float:
    """The step of a metrics line; a line that a crash cut in half counts as later than all."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
