"""Measures checkpoints on benchmarks, with lm-evaluation-harness's prompts and scoring; posttrain/eval_benchmarks.py is the command."""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from posttrain.common import files, gpus, terminal
from posttrain.evaluation.compare import holm, majority_baseline, p_value, random_baseline, rate
from posttrain.evaluation.measure import Item, measure
from posttrain.evaluation.tasks import BENCHMARKS, UNREAD, load_tasks, task_name, write_tasks
from posttrain.model import assistant
from posttrain.model.assistant import dtype_on
from posttrain.model.command_line import trusted_places
from posttrain.parallel.launched import read_launch
from posttrain.parallel.ranks import gathered, on_rank_0
from posttrain.run import charts

SURE = 0.05  # p-values below this count as a difference


def evaluate(options: argparse.Namespace, names: list[str], notes: list[str]) -> None:
    """Measure every checkpoint of a command line on the benchmarks, and write the results; posttrain/eval_benchmarks.py has the options.

    `notes` are remarks on the choice of benchmarks. All ranks.
    """
    assistant.quiet_libraries()
    places = trusted_places(options.checkpoint, options)
    device = _connect()
    notes = notes + on_rank_0(lambda: _prepare(names, options))
    items = {name: _measure(name, place, names, device, options) for name, place in places.items()}
    if dist.get_rank() == 0:
        _report(items, names, options, notes)


def _prepare(names: list[str], options: argparse.Namespace) -> list[str]:
    """Write the task files and load them once, so that missing data is found before any model is read. Return notes for the user."""
    folder = options.output / "tasks"
    notes = write_tasks(names, options.mode, options.data, folder)
    load_tasks(str(folder), [task_name(name, options.mode) for name in names], sys.maxsize)
    return notes


def _connect() -> torch.device:
    """Join the process group of the launcher's ranks, or of this process alone; return this rank's device. All ranks."""
    here = read_launch()
    if here.world_size > 1:
        os.environ |= here.as_environment()
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not torch.cuda.is_available():
        return torch.device(gpus.usual_device() if here.rank == 0 else "cpu")  # which says why
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)
    return device


def _measure(name: str, place: str, benchmarks: list[str], device: torch.device, options: argparse.Namespace) -> dict[str, list[Item]]:
    """Return every item of every benchmark for the checkpoint at `place`, in order. All ranks."""
    loaded = assistant.load(place, name, options.tokenizer, dtype_on(device.type, options.dtype), device)
    if options.chat == "on" and loaded.chat is None:
        raise ValueError(f"{name} cannot be asked in a chat template: {loaded.why_no_chat}")
    if dist.get_rank() == 0:
        terminal.say(f"{name}: {loaded.model.num_parameters():,} parameters, {str(loaded.model.dtype).removeprefix('torch.')}")
    chat = options.chat == "on" or (options.chat == "auto" and loaded.has_template and loaded.chat is not None)
    if chat:
        loaded.tokenizer.chat_template = loaded.chat.asking_jinja
    elif loaded.has_template and options.chat == "auto" and dist.get_rank() == 0:
        terminal.say(f"note: {name} is asked without its chat template: {loaded.why_no_chat}")
    batch_size = options.batch_size
    if batch_size > 1 and loaded.context_in_batches < loaded.context:
        batch_size = 1
        if dist.get_rank() == 0:
            terminal.say(f"note: {name} reads one text at a time, since its rotary frequencies depend on the longest text of a batch")
    share = measure(
        loaded,
        benchmarks,
        mode=options.mode,
        tasks=options.output / "tasks",
        max_samples=options.max_samples,
        batch_size=batch_size,
        chat=chat,
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
    )
    shares = gathered(share)
    return {benchmark: sorted(itertools.chain.from_iterable(one[benchmark] for one in shares)) for benchmark in benchmarks}


def _report(items: dict[str, dict[str, list[Item]]], names: list[str], options: argparse.Namespace, notes: list[str]) -> None:
    """Write and print what the items of each model and benchmark show."""
    output, mode = options.output, options.mode
    _write_items(items, names, output / "items", mode)
    scores = {model: {name: [item.score for item in found[name]] for name in names} for model, found in items.items()}
    results = {model: {name: rate(scores[model][name])._asdict() for name in names} for model in items}
    baselines = {name: _baselines(next(iter(items.values()))[name], name) for name in names}
    single = {
        (f"{a} against {b}", name): p_value(scores[a][name], scores[b][name]) for a, b in itertools.combinations(items, 2) for name in names
    }
    adjusted = holm(single)
    pairs = {pair: {name: adjusted[pair, name] for name in names} for pair, _ in single}
    notes = notes + _unread_answers(items, names)
    table = _table(results, baselines, pairs, names, mode)
    facts = {
        "mode": mode,
        "baselines": baselines,
        "p_values": pairs,
        "p_values_alone": {f"{pair}, {name}": p for (pair, name), p in single.items()},
        "notes": notes,
        "max_samples": options.max_samples,
    }
    files.write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
    files.write_whole(output / "details.json", json.dumps(facts, indent=2) + "\n")
    files.write_whole(output / "results.md", "\n".join([table, "", *(f"- {note}" for note in notes)]) + "\n")
    charts.save_png(charts.bars(f"Benchmarks by {mode}, 95 % intervals", results), output / "results.png")
    terminal.say(table)
    for note in notes:
        terminal.say(f"note: {note}")
    terminal.say(
        f"\nin {output}: results.md, results.json, results.png, items/ (every prompt, answer and score), tasks/ (for lm_eval itself)"
    )


def _write_items(items: dict[str, dict[str, list[Item]]], names: list[str], folder: Path, mode: str) -> None:
    """Write a JSONL file of items for each model and benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    for model, found in items.items():
        for name in names:
            lines = [json.dumps(item._asdict(), ensure_ascii=False) for item in found[name]]
            files.write_whole(folder / f"{model}_{task_name(name, mode)}.jsonl", "\n".join(lines) + "\n")


def _baselines(items: list[Item], name: str) -> dict[str, float | None]:
    """Return what guessing and the commonest answer score on a benchmark; None where that is not defined."""
    majority = majority_baseline([item.target for item in items]) if BENCHMARKS[name].choices else None
    return {"random": random_baseline([item.chance for item in items]), "majority": majority}


def _unread_answers(items: dict[str, dict[str, list[Item]]], names: list[str]) -> list[str]:
    """Return a note for each model and benchmark with answers from which nothing could be read."""
    notes = []
    for model, found in items.items():
        for name in names:
            if unread := sum(item.answer[-1] == UNREAD for item in found[name]):
                notes.append(f"{model}, {name}: nothing could be read from {unread} of {len(found[name])} answers; they count as wrong")
    return notes


def _table(results: dict, baselines: dict, pairs: dict, names: list[str], mode: str) -> str:
    """Return a Markdown table of scores, a row for each benchmark, and below it one of p-values, a column for each pair of checkpoints."""
    models = list(results)
    lines = [f"| | items | random | majority | {' | '.join(models)} |", "|---|" + "---|" * (3 + len(models))]
    for name in names:
        cells = [_cell(results[model][name], baselines[name]["random"]) for model in models]
        known = [_percent(baselines[name][kind]) for kind in ("random", "majority")]
        metric = BENCHMARKS[name].metric[mode]
        lines.append(f"| {name} ({metric}) | {results[models[0]][name]['n']:,} | {' | '.join(known + cells)} |")
    lines += ["", "In brackets: 95 % intervals; = marks those that include the score of guessing."]
    if pairs:
        title = "paired tests on the same items, corrected for the number of comparisons"
        lines += ["", f"| {title} | {' | '.join(pairs)} |", "|---|" + "---|" * len(pairs)]
        lines += [f"| {name} | {' | '.join(_said(found[name]) for found in pairs.values())} |" for name in names]
    return "\n".join(lines)


def _said(p: float) -> str:
    """Return what a p-value says of two checkpoints."""
    shown = "< 0.001" if p < 0.001 else f"= {p:.2g}"
    return f"p {shown}" if p < SURE else f"not distinguishable (p {shown})"


def _cell(one: dict, chance: float | None) -> str:
    """Return a score with its interval, marked = where that includes the score of guessing."""
    equal = " =" if chance is not None and one["low"] <= chance <= one["high"] else ""
    return f"{100 * one['value']:.1f} % ({100 * one['low']:.1f} to {100 * one['high']:.1f}){equal}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
