"""Where curves, texts and histograms of a run go besides metrics.jsonl: TensorBoard, and Weights & Biases by wandb_log. Both get the same.

tensorboard --logdir runs     the page to begin with is #custom_scalars; #hparams compares runs of a sweep
"""

import html
import math
import re
from pathlib import Path
from typing import Protocol

import numpy as np

Charts = dict[str, dict[str, list[str]]]  # group -> chart -> tags that it shows
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
Answers = list[dict[str, str]]  # of each prompt: the prompt and each model's answer, by name


class Tracker(Protocol):
    """What a run tells. Tags are SPLIT/METRIC, metrics named as TRL names them."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...
    def texts(self, texts: dict[str, str], step: int) -> None:
        """Markdown."""

    def answers(self, answers: Answers, step: int) -> None: ...
    def histograms(self, values: dict[str, np.ndarray], step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, kind: str, settings: dict, first_step: int):
        """What an earlier start has told from `first_step` on is hidden. `settings`: what the hparams page compares."""
        from torch.utils.tensorboard import SummaryWriter  # half a second that only the rank which writes needs
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder), purge_step=first_step if first_step > 1 else 0)
        charts = {group: {name: ["Multiline", tags] for name, tags in charts.items()} for group, charts in LAYOUT[kind].items()}
        self.writer.add_custom_scalars(charts)
        plain = {name: value if type(value) in (int, float) else str(value) for name, value in settings.items()}
        for summary in hparams(plain, dict.fromkeys(RESULTS[kind], 0.0)):
            self.writer.file_writer.add_summary(summary)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def texts(self, texts: dict[str, str], step: int) -> None:
        for tag, text in texts.items():
            self.writer.add_text(tag, text, step)

    def answers(self, answers: Answers, step: int) -> None:
        for number, one in enumerate(answers, start=1):
            head = "| " + " | ".join(one) + " |\n|" + "---|" * len(one)
            self.writer.add_text(f"samples/{number}", f"{head}\n| " + " | ".join(map(as_cell, one.values())) + " |", step)

    def histograms(self, values: dict[str, np.ndarray], step: int) -> None:
        for tag, array in values.items():
            self.writer.add_histogram(tag, array, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The same run at every start of it; steps that it has already are not taken twice."""

    def __init__(self, folder: Path, project: str, name: str, identity: str, settings: dict):
        try:
            import wandb
        except ImportError:
            raise ValueError("wandb_log=True needs the wandb package: pip install wandb") from None
        self.wandb = wandb
        self.run = wandb.init(project=project, name=name, dir=str(folder), config=settings, id=identity, resume="allow")

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
        self.run.finish()


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no nan."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def ledger(manifest: dict) -> str:
    """What prepared data was made of, and what was dropped or changed on the way, as Markdown."""
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
    """A text of a model as one cell of a Markdown table, its own Markdown shown and not obeyed."""
    quoted = re.sub(r"[^\w\s]", lambda sign: f"&#{ord(sign[0])};", text)
    return quoted.replace("\n", "<br>") or "(nothing)"
