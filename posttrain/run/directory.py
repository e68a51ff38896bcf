"""Writes a run's directory: recipe, metrics, TensorBoard events, samples, logs, checkpoints and the final model.

runs/NAME/recipe.yaml       the resolved recipe; usable as RECIPE.yaml
runs/NAME/run.json          kind, plan version, how global_batch_size was given, versions, every start and its machine, extensions of
                            the run, and what ds_config: auto and max_tokens_per_gpu: auto have found
runs/NAME/data.json         the manifest of the data
runs/NAME/model/            all of final/ but the weights, so that a checkpoint can be converted into a model
runs/NAME/metrics.jsonl     one object per line: step, split and metrics, named as in TensorBoard; null for a value that is not finite
runs/NAME/samples.jsonl     answers to the fixed prompts, one line for each time they were asked: step, and prompt, answer, tokens of each
runs/NAME/benchmarks/       task files of the benchmarks measured during training, and the log-probs of the last measurement
runs/NAME/health.jsonl      the findings about the run's health, and at which step
runs/NAME/logs/             libraries' output, one file per rank
runs/NAME/bad_batches.jsonl steps that were not applied: reason, and the loss of each example (weight 0: only tried for memory, at step 1)
runs/NAME/checkpoints/      step_000200/ ... to continue from
runs/NAME/final/            the result, a Hugging Face folder
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist

from posttrain.common import files, terminal
from posttrain.common.hub import is_hub_name
from posttrain.data.batches import PLAN_VERSION
from posttrain.recipes.keys import ANY_TIME, Recipe
from posttrain.run import stored
from posttrain.run.health import Facts, Finding, Health
from posttrain.run.resume import CREATING, LOGS, extension_of, length_of, moved_paths
from posttrain.run.stored import read_facts, read_log, read_recipe
from posttrain.run.trackers import TensorBoard, Tracker, WeightsAndBiases, finite, ledger

RECORD = {"step", "split"}  # what a line of metrics.jsonl holds besides metrics


class Run:
    """Writes the run's directory, and what is printed about the run, on rank 0; on other ranks every method does nothing."""

    def __init__(self, recipe: Recipe, rank: int, inputs: dict[str, str]):
        """`inputs`: hashes of what the recipe names by path. Raises ValueError if they have changed since the run began."""
        self.path, self.rank, self.recipe = Path(recipe.out_dir), rank, recipe
        self.final = self.path / "final"
        self.as_resolved = recipe.model_dump() | {"batch_size": None, "gradient_accumulation_steps": None, "extend": False}
        if recipe.warmup_ratio is not None:
            self.as_resolved["warmup_iters"] = None
        packages = {name: version(name) for name in ("posttrain", "deepspeed", "torch", "transformers")}
        self.facts = {"kind": recipe.kind, "plan_version": PLAN_VERSION, "inputs": inputs, "packages": packages}
        self.trackers: list[Tracker] = []
        self.fitted: dict | None = None  # what max_tokens_per_gpu: auto has found, see training/auto_batch.py
        self.layout: dict | None = None  # what ds_config: auto has chosen, see training/auto_layout.py
        if stored.is_run(self.path):  # on every rank, so that all raise
            began_with = read_facts(self.path, "inputs")["inputs"]
            if began_with.keys() != inputs.keys():
                raise ValueError(
                    f"{self.path} was begun by another version of this code, which identified its inputs differently; finish it with "
                    "that version, or give another --out_dir"
                )
            if changed := [name for name, value in inputs.items() if began_with[name] != value]:
                moved = [f"{name}: {then} -> {now}" for name, (then, now) in moved_paths(recipe).items()]
                where = ", ".join(moved) or "although the paths are the same"
                raise ValueError(
                    f"{' and '.join(changed)} changed since {self.path} began ({where}): continuing would mix two runs. Restore what it "
                    "began with, or start a new run with another --out_dir"
                )

    def keep_layout(self, asked: Recipe, layout: dict) -> None:
        """Take `layout`, with which this start trains, for run.json, while recipe.yaml keeps the auto of the recipe as it was `asked`."""
        self.layout = layout
        self.as_resolved |= {name: getattr(asked, name) for name in layout if name != "as"}

    def _create(self, total_steps: int, describe_model: Callable[[Path], None], manifest: dict) -> None:
        """Create the directory of a new run, run.json last."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / CREATING).touch()
        (self.path / "model").mkdir(exist_ok=True)
        describe_model(self.path / "model")
        stored.write_recipe(self.path, self.as_resolved)
        files.write_whole(self.path / "data.json", json.dumps(manifest, indent=2) + "\n")
        form = {name: getattr(self.recipe, name) for name in ("batch_size", "gradient_accumulation_steps")}
        own = {"batch_form": form, "total_steps": total_steps, "warmup_iters": self.recipe.warmup_iters, "wandb_id": uuid.uuid4().hex[:8]}
        own["model_files"] = stored.files_in(self.path / "model")
        files.sync_files(self.path / "model")
        stored.write_facts(self.path, self.facts | own)  # last: its presence makes the folder a run
        (self.path / CREATING).unlink()

    def _mend(self, describe_model: Callable[[Path], None]) -> None:
        """Write model/ anew if it is not what it was, and recipe.yaml where model, data or tokenizer lie elsewhere now; say both."""
        (self.path / CREATING).unlink(missing_ok=True)  # of a start that was killed before it did so
        problem = stored.model_problem(self.path)
        if problem or "model_files" not in read_facts(self.path):  # older versions did not note them, and wrote less
            shutil.rmtree(self.path / "model", ignore_errors=True)
            (self.path / "model").mkdir()
            describe_model(self.path / "model")
            files.sync_files(self.path / "model")
            self._update(model_files=stored.files_in(self.path / "model"))
        if problem:
            self.say(f"warning  {problem}: {self.path / 'model'} was written anew")
        moved = {
            name: (then, now)
            for name, (then, now) in moved_paths(self.recipe).items()
            if now is None or os.path.exists(now) or is_hub_name(now)  # else it is nowhere, and the run goes on from its checkpoint
        }
        if moved:
            now_there = {name: now for name, (_, now) in moved.items()}
            stored.write_recipe(self.path, read_recipe(self.path) | now_there)
        for name, (then, now) in moved.items():
            if not (then and now and os.path.realpath(then) == os.path.realpath(now)):
                self.say(f"moved      {name}: {then} -> {now}, the same content")

    def start(
        self,
        first_step: int,
        total_steps: int,
        *,
        describe_model: Callable[[Path], None],
        manifest: dict,
        facts: Facts,
        states: dict[str, float],
    ) -> None:
        """Open the logs at `first_step`, cutting off what an earlier start wrote from there on, so that no step is recorded twice.

        `describe_model` writes the model's files other than weights into a folder, for a new run; `manifest` is the data's; `facts` are for
        the health checks; `states` are the bytes that a rank keeps, by kind, for the HTML report.
        """
        terminal.keep_noise_in(self.path / LOGS / f"rank_{self.rank}.log")
        if self.rank:
            return
        if not stored.is_run(self.path):
            self._create(total_steps, describe_model, manifest)
        else:
            self._mend(describe_model)
            if change := extension_of(self.recipe):
                stored.write_recipe(self.path, self.as_resolved)
                self._update(extended=[{"from_step": first_step, **change}], total_steps=total_steps)
        if self.fitted:
            self._update(fitted=self.fitted)
        if self.layout:
            self._update(layout=self.layout)
        if self.recipe.checks == "off":
            self._update(unchecked_from_steps=[first_step])
        for name in stored.LOGS:
            if damaged := stored.cut_log(self.path, name, first_step):
                what = f"line{'s' if len(damaged) > 1 else ''} {', '.join(map(str, damaged))} of {self.path / name}"
                self.say(f"warning  {what} cannot be read: moved to {name}.damaged, and the run goes on without")
        self.metrics_file = (self.path / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        free = self.recipe.keys_that_change(ANY_TIME)
        compared = {name: value for name, value in self.as_resolved.items() if value is not None and name not in free}
        self.trackers.append(TensorBoard(self.path, self.facts["kind"], compared, first_step))
        if self.recipe.wandb_log:
            name, identity = self.recipe.wandb_run_name or self.path.name, read_facts(self.path, "wandb_id")["wandb_id"]
            self.trackers.append(WeightsAndBiases(self.path, self.recipe.wandb_project, name, identity, self.as_resolved, self.say))
        texts = {"recipe": f"```yaml\n{(self.path / 'recipe.yaml').read_text(encoding='utf-8')}\n```", "data": ledger(manifest)}
        for tracker in self.trackers:
            tracker.texts(texts, first_step - 1)
        self.steps = terminal.Steps(first_step, total_steps, self.recipe.log_interval)
        self.steps.start()
        self.health = Health(self.recipe, total_steps, facts)
        for record in read_log(self.path, "metrics.jsonl"):  # replays what was seen before a restart
            self.health.see(record["step"], record["split"], {name: value for name, value in record.items() if name not in RECORD})
        self.health.told = {record["name"] for record in read_log(self.path, "health.jsonl")}
        self._record_findings(first_step - 1, self.health.before())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        start = {"from_step": first_step, "when": _now(), "ranks": dist.get_world_size() if dist.is_initialized() else 1, "device": device}
        start |= {"ds_config": Path(self.recipe.ds_config).stem, "states": states}
        self._update(starts=[start], parameters=facts.parameters)

    def _update(self, **changes) -> None:
        """Merge changes into run.json; lists are appended to."""
        facts = read_facts(self.path)
        for name, value in changes.items():
            facts[name] = [*facts.get(name, []), *value] if isinstance(value, list) else value
        stored.write_facts(self.path, facts)

    def log(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Record the metrics of a step: in metrics.jsonl, in all trackers (as SPLIT/NAME), and for the health checks.

        `split`: "train" or "eval".
        """
        if self.rank:
            return
        with files.naming(self.path / "metrics.jsonl"):
            self.metrics_file.write(json.dumps({"step": step, "split": split, **finite(metrics)}) + "\n")
        for tracker in self.trackers:
            tracker.scalars({f"{split}/{name}": value for name, value in metrics.items()}, step)
        self._record_findings(step, self.health.see(step, split, metrics))

    def log_histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        """Record values of all validation examples, as examples/NAME: TensorBoard confuses a histogram with a scalar of the same tag."""
        for tracker in self.trackers:
            tracker.histograms({f"examples/{name}": array for name, array in values.items()}, step)

    def log_samples(self, step: int, samples: list[dict]) -> None:
        """Record the answers to the fixed prompts (prompt, answer, tokens); trackers show each prompt's first answer beside the new one."""
        if self.rank:
            return
        self._append("samples.jsonl", {"step": step, "samples": samples})
        before: dict[str, str] = {}  # prompt -> first answer; a restart may have added prompts
        for record in read_log(self.path, "samples.jsonl"):
            before = {one["prompt"]: one["answer"] for one in record["samples"]} | before
        begin = "before" if self.facts["kind"] == "sft" else "reference"
        rows = [{"prompt": one["prompt"], begin: before[one["prompt"]], "now": one["answer"]} for one in samples]
        for tracker in self.trackers:
            tracker.answers(rows, step)

    def _record_findings(self, step: int, findings: list[Finding]) -> None:
        """Print and record the findings of the health checks."""
        for finding in findings:
            self._append("health.jsonl", {"step": step, **finding._asdict()})
            self.say(f"health   step {step}: {finding}")
            for tracker in self.trackers:
                tracker.texts({"health": f"**{finding.name}**: {finding}"}, step)

    def _append(self, name: str, record: dict) -> None:
        """Append a line of JSON to a file of the run."""
        with files.naming(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def has_looked(self, step: int) -> bool:
        """Whether metrics.jsonl has a validation at `step`."""
        records = read_log(self.path, "metrics.jsonl")
        return any(record["step"] == step and record["split"] == "eval" for record in records)

    def step_line(self, step: int, metrics: dict[str, float]) -> None:
        """Show a step's main metrics in the terminal."""
        if self.rank:
            return
        parts = [f"lr {metrics['learning_rate']:.2e}", f"{metrics['step_ms']:.0f} ms", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
        self.steps.step(step, metrics["step_ms"] / 1000, [*_main_metrics(metrics), *parts, f"{metrics['memory_gb']:.1f} GB"])

    def eval_line(self, step: int, metrics: dict[str, float]) -> None:
        """Print a validation's main metrics."""
        self.say(" | ".join([f"eval at step {step}", *_main_metrics(metrics)]))

    def bad_batch(self, step: int, reason: str, metrics: dict[str, float], examples: list[dict]) -> None:
        """Record a step that was not applied, in bad_batches.jsonl."""
        if self.rank:
            return
        numbers = finite({name: metrics[name] for name in ("loss", "grad_norm")})
        self._append("bad_batches.jsonl", {"step": step, "reason": reason, **numbers, "examples": examples})

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.rank == 0:
            terminal.say(text)

    def sync(self) -> None:
        """Flush the logs to disk, before a checkpoint is saved: it must not outlive the records of the steps before it."""
        if self.rank == 0:
            with files.naming(self.path / "metrics.jsonl"):
                os.fsync(self.metrics_file.fileno())
            for tracker in self.trackers:
                tracker.flush()

    def finished(self) -> None:
        """Record in run.json that final/ is complete, with what is in it, and the run's length."""
        if self.rank == 0:
            written = {name: facts for name, facts in stored.files_in(self.final).items() if name != "README.md"}  # which people write on
            self._update(finished=length_of(self.recipe), ended=_now(), final_files=written)

    def close(self) -> None:
        """Close the logs and the trackers."""
        if not self.trackers:
            return
        terminal.stop_live()
        self.metrics_file.close()
        for tracker in self.trackers:
            tracker.close()


def _main_metrics(metrics: dict[str, float]) -> list[str]:
    """Returns the metrics that the terminal shows first, as texts; metrics.jsonl has the rest."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if "rewards/margins" in metrics:
        parts += [f"margin {metrics['rewards/margins']:.3f}", f"accuracy {metrics['rewards/accuracies']:.2f}"]
    return parts


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
