"""Sends a run's metrics, texts and histograms to TensorBoard, and with wandb_log to Weights & Biases. Both get the same.

tensorboard --logdir runs     begin with the page #custom_scalars; #hparams compares the runs of a sweep
"""

import contextlib
import html
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from posttrain.common.errors import first_line
from posttrain.common.files import naming
from posttrain.run.wandb_mode import how_to_send

Charts = dict[str, dict[str, list[str]]]  # group -> chart -> tags that the chart shows
LEARNING = {"loss": ["train/loss", "eval/loss"], "learning rate": ["train/learning_rate"], "gradient norm": ["train/grad_norm"]}
COST = {"tokens per second": ["train/tokens_per_second"], "ms a step": ["train/step_ms"], "memory, GB": ["train/memory_gb"]}
PREFERENCE = {
    "rewards": ["train/rewards/chosen", "train/rewards/rejected"],
    "margin": ["train/rewards/margins", "eval/rewards/margins"],
    "accuracy": ["train/rewards/accuracies", "eval/rewards/accuracies"],
    "log-probs of answers": ["train/logps/chosen", "train/logps/rejected"],
}
LAYOUT: dict[str, Charts] = {
    "sft": {"1 learning": LEARNING, "2 cost": COST},
    "dpo": {"1 preference": PREFERENCE, "2 learning": LEARNING, "3 cost": COST},
}
RESULTS = {"sft": ("train/loss", "eval/loss"), "dpo": ("train/loss", "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")}
# wandb's settings, in seconds: it would wait 90 for its server to open a run, and for ever for it to take the last values
WAITS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "300", "WANDB_FINISH_TIMEOUT_RAISES": "true"}
Answers = list[dict[str, str]]  # for each prompt: column -> text, the columns being the prompt and the answers to it


class Tracker(Protocol):
    """Receives what a run records. Tags of scalars are SPLIT/METRIC, with TRL's names for the metrics."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...
    def texts(self, texts: dict[str, str], step: int) -> None:
        """`texts`: tag -> Markdown."""

    def answers(self, answers: Answers, step: int) -> None: ...
    def histograms(self, values: dict[str, np.ndarray], step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes TensorBoard events."""

    def __init__(self, folder: Path, kind: str, settings: dict, first_step: int):
        """Hide what an earlier start has written from `first_step` on. `settings`: what the page #hparams compares."""
        from torch.utils.tensorboard import SummaryWriter  # half a second that only the rank which writes needs
        from torch.utils.tensorboard.summary import hparams

        self.folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=first_step if first_step > 1 else 0)
        charts = {group: {name: ["Multiline", tags] for name, tags in charts.items()} for group, charts in LAYOUT[kind].items()}
        self.writer.add_custom_scalars(charts)
        plain = {name: value if type(value) in (int, float) else str(value) for name, value in settings.items()}
        for summary in hparams(plain, dict.fromkeys(RESULTS[kind], 0.0)):
            self.writer.file_writer.add_summary(summary)

    def scalars(self, values: dict[str, float], step: int) -> None:
        with self._naming():
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def texts(self, texts: dict[str, str], step: int) -> None:
        with self._naming():
            for tag, text in texts.items():
                self.writer.add_text(tag, text, step)

    def answers(self, answers: Answers, step: int) -> None:
        texts = {}
        for number, one in enumerate(answers, start=1):
            head = "| " + " | ".join(one) + " |\n|" + "---|" * len(one)
            texts[f"samples/{number}"] = f"{head}\n| " + " | ".join(map(as_cell, one.values())) + " |"
        self.texts(texts, step)

    def histograms(self, values: dict[str, np.ndarray], step: int) -> None:
        with self._naming():
            for tag, array in values.items():
                self.writer.add_histogram(tag, array, step)

    def flush(self) -> None:
        with self._naming():
            self.writer.flush()

    def close(self) -> None:
        with self._naming():
            self.writer.close()

    def _naming(self) -> contextlib.AbstractContextManager:
        """Name the events file in a system error, which its writer's thread hands on to whatever is called next."""
        return naming(self.folder / "events.out.tfevents...")


class WeightsAndBiases:
    """Logs to one Weights & Biases run (`identity` is its id), which every start continues; it ignores steps that it already has."""

    def __init__(self, folder: Path, project: str, name: str, identity: str, settings: dict, say: Callable[[str], None]):
        """Open the run, offline where it cannot be opened online. `say` prints a line."""
        for what, seconds in WAITS.items():
            os.environ.setdefault(what, seconds)
        import wandb

        self.wandb, self.folder, self.say = wandb, folder, say
        run = {"project": project, "name": name, "dir": str(folder), "config": settings, "id": identity, "resume": "allow"}
        try:
            self.run = wandb.init(**run)
        except wandb.Error as error:
            say(f"warning    Weights & Biases keeps this run offline: {first_line(error)}. {how_to_send(folder)}")
            wandb.teardown()  # wandb 0.31's service would call the run's id in use
            self.run = wandb.init(**run, mode="offline")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def texts(self, texts: dict[str, str], step: int) -> None:
        self.run.log(
            {tag: self.wandb.Html(f"<pre>{html.escape(text, quote=False)}</pre>", inject=False) for tag, text in texts.items()}, step=step
        )

    def answers(self, answers: Answers, step: int) -> None:
        columns = list(answers[0])
        self.run.log({"samples": self.wandb.Table(columns=columns, data=[[one[name] for name in columns] for one in answers])}, step=step)

    def histograms(self, values: dict[str, np.ndarray], step: int) -> None:
        self.run.log({tag: self.wandb.Histogram(array[np.isfinite(array)]) for tag, array in values.items()}, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        try:
            self.run.finish()
        except TimeoutError:
            self.say(f"warning    Weights & Biases has not taken everything. {how_to_send(self.folder).replace('offline-', '')}")


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Returns the metrics with None for nan and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def ledger(manifest: dict) -> str:
    """Returns, as Markdown, what prepared data was made from, and what was dropped or changed. `manifest`: the data's."""
    counts, tokens = manifest["counts"], manifest["tokens"]
    table = [
        *(f"| {entry['rows']:,} | {cause} | {entry['first']} |" for cause, entry in manifest["ledger"].items()),
        *(f"| {count:,} | changed: {what} | |" for what, count in manifest["changes"].items()),
    ]
    lines = [
        f"{counts['train']:,} rows for training and {counts['validation']:,} for validation of {manifest['rows']:,} read from "
        f"{', '.join(manifest['sources'])}; an epoch is {tokens['per_epoch']:,} tokens, {tokens['trained_per_epoch']:,} of them trained.",
        "",
        *(["| rows | dropped or changed | first |", "|---:|---|---|", *table, ""] if table else []),
        *(f"- {note}" for note in manifest["notes"]),
    ]
    return "\n".join(lines)


def as_cell(text: str) -> str:
    """Returns a model's text as a cell of a Markdown table, escaped so that Markdown and HTML in it are shown as they are."""
    quoted = re.sub(r"[^\w\s]", lambda sign: f"&#{ord(sign[0])};", text)
    return quoted.replace("\n", "<br>") or "(empty)"
