"""Writes one page about runs, from their files alone; posttrain/report.py is the command."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np

from posttrain.common.files import read_object, write_whole
from posttrain.common.links import refuse_links
from posttrain.common.terminal import duration
from posttrain.run import charts, stored

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name(PAGE)
# of each chart: title, metrics of training steps, metrics of validations, whether on a logarithmic scale
CHARTS = (
    ("Loss", ["loss"], ["loss"], False),
    ("Margin of rewards, chosen above rejected", ["rewards/margins"], ["rewards/margins"], False),
    ("Reward accuracy", ["rewards/accuracies"], ["rewards/accuracies"], False),
    ("Rewards: chosen, and dashed rejected", ["rewards/chosen", "rewards/rejected"], [], False),
    ("Log-probs of answers: chosen, and dashed rejected", ["logps/chosen", "logps/rejected"], [], False),
    ("Gradient norm, before clipping", ["grad_norm"], [], True),
    ("Learning rate", ["learning_rate"], [], False),
    ("Tokens of sample answers", [], ["sample_tokens"], False),
    ("Tokens per second, all ranks", ["tokens_per_second"], [], False),
    ("Memory of rank 0, GB", ["memory_gb"], [], False),
)
FIRST = {"loss", "rewards/accuracies", "rewards/margins"}  # the table's first columns
ALWAYS_DIFFER = {"out_dir"}  # keys of recipes that always differ


@dataclass
class RunFiles:
    """The files of a run's directory, each read once; `colour` is the run's in every chart."""

    path: Path
    name: str
    colour: str

    @cached_property
    def facts(self) -> dict:
        """run.json: the kind of the run, its starts and its end."""
        return stored.read_facts(self.path, "kind", "total_steps")

    @cached_property
    def recipe(self) -> dict:
        """recipe.yaml: the value of every key."""
        recipe = stored.read_recipe(self.path)
        return recipe if "checkpoint_path" in recipe else stored.read_recipe(self.path, "sft_checkpoint_path")

    @cached_property
    def manifest(self) -> dict | None:
        """data.json: the manifest of the prepared data; None for runs of versions that kept none."""
        return stored.read_data(self.path)

    @cached_property
    def records(self) -> list[dict]:
        """metrics.jsonl: the metrics of every step and every validation."""
        return stored.read_log(self.path, "metrics.jsonl")

    @cached_property
    def samples(self) -> list[dict]:
        """samples.jsonl: sample answers of every validation; none where the run sampled none."""
        return stored.read_log(self.path, "samples.jsonl")

    @cached_property
    def findings(self) -> list[dict]:
        """health.jsonl: what the health checks have found."""
        return stored.read_log(self.path, "health.jsonl")

    def read(self) -> None:
        """Read all files now. Raises ValueError naming one that is damaged, and the line."""
        for name in ("facts", "recipe", "manifest", "records", "samples", "findings"):
            getattr(self, name)

    def series(self, split: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps at which a metric was recorded, and its values; nan where it was not finite."""
        found = [(record["step"], record[metric]) for record in self.records if record["split"] == split and metric in record]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, float), np.array([np.nan if value is None else value for value in values], float)

    @property
    def steps(self) -> int:
        """The last step that was trained."""
        return max((record["step"] for record in self.records if record["split"] == "train"), default=0)

    @property
    def state(self) -> str:
        """How far the run has come, in words."""
        if (self.path / "final").is_dir() and "finished" in self.facts:
            return "finished"
        return f"{self.steps:,} of {self.facts['total_steps']:,} steps"


def read_runs(paths: list[Path]) -> list[RunFiles]:
    """Return the runs, named by their folders; where two are alike, by their paths. Raises ValueError for one that is damaged or none."""
    runs, names = [], [path.resolve().name for path in paths]
    for number, path in enumerate(paths):
        if not stored.is_run(path):
            inside = sorted(str(one.parent) for one in path.glob("*/run.json")) if path.is_dir() else []
            hint = f"; there are {', '.join(inside)}" if inside else ""
            raise ValueError(f"{path} is not a run: it has no run.json{hint}")
        refuse_links(path)
        name = names[number] if names.count(names[number]) == 1 else str(path)
        runs.append(RunFiles(path, name, charts.COLOURS[number % len(charts.COLOURS)]))
        runs[-1].read()
    return runs


def figures(runs: list[RunFiles]) -> Iterator[tuple[str, object]]:
    """Yield the name and the figure of every chart that some run has numbers for."""
    benchmarks = sorted({name for run in runs for record in run.records for name in record if name.startswith("benchmark/")})
    for title, training, validation, log_scale in [*CHARTS, *((f"Benchmark {name[10:]}", [], [name], False) for name in benchmarks)]:
        curves = []
        for run in runs:
            for number, metric in enumerate(training):
                steps, values = run.series("train", metric)
                if np.isfinite(values).any():
                    label = run.name if not number else f"{run.name}, rejected"
                    curves.append(charts.Curve(label, steps, values, run.colour, dashed=number > 0))
            for metric in validation:
                steps, values = run.series("eval", metric)
                if np.isfinite(values).any():
                    label = f"{run.name}, validation" if training else run.name
                    curves.append(charts.Curve(label, steps, values, run.colour, dashed=bool(training), sparse=True))
        if curves:
            yield re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_"), charts.draw(title, curves, log_scale)


def table(runs: list[RunFiles]) -> tuple[list[str], list[tuple[RunFiles, list]]]:
    """Return the columns' names, and a row for each run with its last value of each, None where it has none."""
    names: dict[str, None] = {}
    last = []
    for run in runs:
        found = {f"{split}/{metric}": value for split in ("train", "eval") for metric, value in _last(run, split).items()}
        last.append(found)
        names |= dict.fromkeys(found)
    order = sorted(names, key=lambda name: (name.partition("/")[2] not in FIRST, name.split("/")[0] != "eval"))
    return order, [(run, [found.get(name) for name in order]) for run, found in zip(runs, last, strict=True)]


def _last(run: RunFiles, split: str) -> dict[str, float | None]:
    """Return each metric's last value at validations; for training, whose steps are noisy, the mean of the last twentieth of them."""
    records = [record for record in run.records if record["split"] == split]
    together = {name: value for record in records for name, value in record.items()}
    shown = [together] if split == "eval" else records[-max(1, len(records) // 20) :]
    names = [name for name in (shown[-1] if shown else {}) if name not in ("step", "split", "runtime", "epoch", "num_tokens", "step_ms")]
    values = {name: [record[name] for record in shown if record.get(name) is not None] for name in names}
    return {name: float(np.mean(found)) if found else None for name, found in values.items()}


def cost(run: RunFiles) -> dict[str, str]:
    """Return where time and memory went, in words."""
    _, step_ms = run.series("train", "step_ms")
    _, looks = run.series("eval", "runtime")
    _, speed = run.series("train", "tokens_per_second")
    _, memory = run.series("train", "memory_gb")
    starts = run.facts.get("starts", [])
    said = {"steps": f"{len(step_ms):,} in {duration(step_ms.sum() / 1000)}"}
    if len(step_ms):
        said["a step"] = f"{np.median(step_ms):,.0f} ms (median; slowest {step_ms.max():,.0f})"
        said["tokens per second"] = f"{np.median(speed):,.0f} on all ranks"
    if len(looks):
        said["validations and samples"] = f"{len(looks):,} in {duration(looks.sum())}"
    if len(starts) == 1 and "ended" in run.facts:
        whole = (datetime.fromisoformat(run.facts["ended"]) - datetime.fromisoformat(starts[0]["when"])).total_seconds()
        said["saving and all else since step 1"] = duration(max(0.0, whole - step_ms.sum() / 1000 - looks.sum()))
    if starts:
        said["machine"] = "; then ".join(dict.fromkeys(f"{start['ranks']} x {start['device']}, {start['ds_config']}" for start in starts))
    if starts and len(memory):
        states = [f"{name} {size / 1e9:.1f}" for name, size in starts[-1]["states"].items() if size > 5e7]
        said["memory of rank 0"] = f"{memory.max():.1f} GB at most"
        said["of it, as calculated"] = f"{', '.join(states)} GB" if states else "less than 0.1 GB"
    return said


def answers(runs: list[RunFiles]) -> list[dict]:
    """Return a dict {prompt, runs} for each sample prompt; `runs` has every run's answers, from before training to the last."""
    prompts: dict[str, dict] = {}
    for run in runs:
        for record in run.samples:
            for sample in record["samples"]:
                asked = prompts.setdefault(sample["prompt"], {"prompt": sample["prompt"], "runs": {}})
                asked["runs"].setdefault(run.name, []).append({"step": record["step"], **sample})
    return list(prompts.values())


def differences(runs: list[RunFiles]) -> list[tuple[str, list[str], bool]]:
    """Return (key, values, whether they differ) for every key of the recipes, those that differ first."""
    names = list(dict.fromkeys(name for run in runs for name in run.recipe))
    rows = []
    for name in names:
        values = ["" if name not in run.recipe else _shown(run.recipe[name]) for run in runs]
        rows.append((name, values, len(set(values)) > 1 and name not in ALWAYS_DIFFER))
    return sorted(rows, key=lambda row: not row[2])


def _shown(value) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def read_results(path: Path | None) -> dict[str, dict[str, dict]]:
    """Return measured results, {model: {metric: {value, low, high}}}, with shares from 0 to 1, and lower_is_better where it is.

    Raises ValueError for a file of another form.
    """
    if path is None:
        return {}
    try:
        results = read_object(path)
        cells = [cell for metrics in results.values() for cell in metrics.values()]
        numbers = [cell.get(name) for cell in cells for name in ("value", "low", "high")]
        why = "" if all(isinstance(one, int | float) for one in numbers) else "some metric lacks one of them, or it is no number"
        why = why or ("" if cells else "it holds no metric")
    except AttributeError:
        why = "some part of it is a number, a text or a list where an object should be"
    except (OSError, ValueError) as error:
        why = str(error)
    if why:
        raise ValueError(f"--results {path} is not a file of results, {{model: {{metric: {{value, low, high}}}}}}: {why}")
    return results


def write(runs: list[RunFiles], results: dict, output: Path) -> Path:
    """Write the page and its pictures into the folder `output`; return the page's path.

    Raises ValueError for a folder that holds something else than a report, which a later one replaces.
    """
    _refuse_other_things(output)
    output.mkdir(parents=True, exist_ok=True)
    drawn = {}
    every = list(figures(runs))
    if results:
        every.insert(0, ("results", charts.bars("Results, with 95 % intervals", results)))
    for name, figure in every:
        charts.save_png(figure, output / f"{name}.png")
        drawn[name] = charts.as_svg(figure, name)
        charts.close(figure)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": lambda value: "" if value is None else f"{value:.4g}", "thousands": lambda value: f"{value:,}"}
    columns, rows = table(runs)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=runs,
        columns=columns,
        rows=rows,
        charts=drawn,
        results=results,
        answers=answers(runs),
        costs={run.name: cost(run) for run in runs},
        differences=differences(runs),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    write_whole(output / PAGE, page)
    return output / PAGE


def _refuse_other_things(output: Path) -> None:
    """Raise ValueError unless `output` is no path yet, or the folder of a report, which may be one that was killed among its pictures."""
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"{output} is not a folder, and a report is written into one: give another --output")
    if not output.is_dir() or all(path.suffix == ".png" for path in output.iterdir()):
        return
    begin = TEMPLATE.read_bytes().partition(b"{{")[0]
    if (output / PAGE).is_file():
        with (output / PAGE).open("rb") as file:
            if file.read(len(begin)) == begin:
                return
    raise ValueError(f"{output} holds other things than a report, which would be mixed with one or overwritten: give another --output")
