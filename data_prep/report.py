"""Tells about preparation: the ledger as a table, in the manifest and as a picture, and progress while it works."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data_prep.choose import Chosen
from data_prep.shapes.columns import IGNORED
from data_prep.shapes.conversations import KEPT
from data_prep.sources import Source, count_rows
from data_prep.staging import HIDDEN, SPELLED, Chunk, column
from posttrain.common.places import command
from posttrain.common.visible import visible
from posttrain.data.manifest import unused_columns

console = Console(highlight=False, soft_wrap=True)
EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


class RowProgress:
    """A progress bar of a source's rows; as a context manager it gives the function that advances it. Without a terminal it is silent."""

    def __init__(self, source: Source, max_samples: int | None, start: int):
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]} rows/s | time left"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        total = count_rows(source, max_samples) if console.is_terminal else None  # counting reads the files
        self.task = self.progress.add_task(escape(visible(source.label)), total=total, completed=start, speed="")

    def __enter__(self):
        self.progress.start()
        return self._advance

    def __exit__(self, *_):
        self.progress.stop()

    def _advance(self, rows: int) -> None:
        self.progress.advance(self.task, rows)
        speed = self.progress.tasks[self.task].speed
        self.progress.update(self.task, speed=f"{speed:,.0f}" if speed else "")


def summary(chunks: list[list[Chunk]], sources: list[Source], chosen: Chosen) -> dict:
    """Counts, ledger and token statistics, as the manifest holds them."""
    ledger: dict[str, dict] = {}
    changes: Counter = Counter()
    for source, several in zip(sources, chunks, strict=True):
        for chunk in several:
            changes.update(chunk.facts["changes"])
            for row, cause in chunk.facts["dropped"]:
                entry = ledger.setdefault(cause, {"rows": 0, "first": f"{source.label}:{row}", "unusable": not cause.startswith(KEPT)})
                entry["rows"] += 1
    notes = [*chosen.notes, *(note for source in sources for note in source.notes)]
    unused = {what.removeprefix(IGNORED): changes.pop(what) for what in list(changes) if what.startswith(IGNORED)}
    if hidden := changes.pop(HIDDEN, 0):
        what = "a row holds" if hidden == 1 else f"{hidden:,} rows hold"
        notes.append(f"{what} characters that are not seen (of no width, or that turn the text around); preview shows them as escapes")
    if spelled := changes.pop(SPELLED, 0):
        what = "a row spells" if spelled == 1 else f"{spelled:,} rows spell"
        notes.append(f"{what} special tokens, such as a chat format's markers; they stay text. Write chats as messages, not as one text")
    flat = [chunk for several in chunks for chunk in several]
    for cause, which in chosen.left_out.items():
        if which.any():
            ledger[cause] = {"rows": int(which.sum()), "first": next(_sources_of(flat, which)), "unusable": False}
    tokens, trained = column(flat, "_tokens"), column(flat, "_trained")
    counts = chosen.counts
    result = {
        "counts": {name: int(which.sum()) for name, which in counts.items()},
        "rows": sum(chunk.facts["rows"] for chunk in flat),
        "ledger": dict(sorted(ledger.items(), key=lambda item: -item[1]["rows"])),
        "changes": dict(changes.most_common()),
        "unused": unused,  # columns, and in how many rows they hold something
        "copies": chosen.copies,
        "notes": notes,
    }
    here = counts["train"]
    histogram, _ = np.histogram(tokens, bins=[*EDGES, np.iinfo(np.int32).max], weights=here)
    result["tokens"] = {
        "per_epoch": int((tokens.astype(np.int64) * here).sum()),
        "trained_per_epoch": int((trained.astype(np.int64) * here).sum()),
        "longest": int(tokens[here > 0].max(initial=0)),
        "histogram": {f"{low}+": int(count) for low, count in zip(EDGES, histogram, strict=True) if count},
    }
    return result


def show(output: Path, manifest: dict) -> None:
    """Print what a manifest says: counts, ledger, notes and lengths."""
    tokens, counts = manifest["tokens"], manifest["counts"]
    console.print(
        f"{output}: {counts['train']:,} rows for training, {counts['validation']:,} for validation, of {manifest['rows']:,} read",
        markup=False,
    )
    share = tokens["trained_per_epoch"] / max(1, tokens["per_epoch"])
    console.print(
        f"an epoch is {tokens['per_epoch']:,} tokens, {share:.1%} of them trained; the longest row has {tokens['longest']:,}",
        markup=False,
    )
    if manifest["ledger"] or manifest["changes"]:
        table = Table("rows", "dropped or changed", "first", box=None, header_style="bold", pad_edge=False)
        table.columns[0].justify = "right"
        for cause, entry in manifest["ledger"].items():
            table.add_row(f"{entry['rows']:,}", Text(visible(cause)), Text(visible(entry["first"])))
        for what, count in manifest["changes"].items():
            table.add_row(f"{count:,}", Text(visible(f"changed: {what}")), "")
        console.print(table)
    for note in [*manifest["notes"], *unused_columns(manifest)]:
        console.print(visible(f"note: {note}"), markup=False)
    widest = max(tokens["histogram"].values(), default=1)
    table = Table("tokens", "rows", "", box=None, header_style="bold", pad_edge=False)
    table.columns[0].justify = table.columns[1].justify = "right"
    for low, count in tokens["histogram"].items():
        table.add_row(low, f"{count:,}", "█" * max(1, round(40 * count / widest)))
    console.print(table)
    console.print(f"look at it with: {command('preview', output)}", markup=False)
    console.print(f"train on it with: {_training_command(output, manifest)}", markup=False)


def _training_command(output: Path, manifest: dict) -> str:
    """Return the command that trains on prepared data, with the model whose tokenizer made it, on the GPUs of this machine."""
    import torch

    kind, model = manifest["kind"], str(manifest["options"]["tokenizer"])
    names = {"sft": ("sft_data_dir", "checkpoint_path"), "dpo": ("dpo_data_dir", "sft_checkpoint_path")}[kind]
    words = [f"--{names[0]}={output}", f"--{names[1]}={'MODEL' if model.endswith('.model') else model}"]
    return command(kind, *words, f"--out_dir=runs/{output.name}", ranks=torch.cuda.device_count())


def _sources_of(chunks: list[Chunk], which: np.ndarray) -> Iterator[str]:
    """Yield the `source` of each marked example."""
    at = 0
    for chunk in chunks:
        table = chunk.table()
        marked = np.flatnonzero(which[at : at + len(table)])
        at += len(table)
        if len(marked):
            yield from table.column("source").take(marked).to_pylist()


def write_dropped(chunks: list[list[Chunk]], sources: list[Source], left_out: dict[str, np.ndarray], path: Path) -> None:
    """Write every row that is not in the data and why, a JSON object in each line."""
    with path.open("w", encoding="utf-8") as file:
        for source, several in zip(sources, chunks, strict=True):
            for chunk in several:
                for row, cause in chunk.facts["dropped"]:
                    file.write(json.dumps({"source": f"{source.label}:{row}", "cause": cause}) + "\n")
        flat = [chunk for several in chunks for chunk in several]
        for cause, which in left_out.items():
            for name in _sources_of(flat, which):
                file.write(json.dumps({"source": name, "cause": cause}) + "\n")


def draw(chunks: list[list[Chunk]], chosen: Chosen, max_length: int, path: Path) -> None:
    """Draw the lengths of the training rows, and how much of each is trained."""
    from matplotlib.figure import Figure  # pyplot would take longer to import than a small dataset to prepare

    flat = [chunk for several in chunks for chunk in several]
    here = chosen.counts["train"]
    tokens, trained = column(flat, "_tokens"), column(flat, "_trained")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(tokens, bins=np.linspace(0, max(1, tokens.max(initial=1)), 50), weights=here, color="#5b8def")
    if tokens.max(initial=0) > 0.5 * max_length:
        left.axvline(max_length, color="#e07b39", linestyle="--", label=f"--max_length {max_length}")
        left.legend(frameon=False)
    left.set(xlabel="tokens in a row", ylabel="rows", title="Length")
    right.hist(100 * trained / np.maximum(1, tokens), bins=np.linspace(0, 100, 41), weights=here, color="#5b8def")
    right.set(xlabel="% of a row's tokens that are trained", ylabel="rows", title="Trained share")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
