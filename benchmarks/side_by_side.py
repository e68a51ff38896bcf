"""Runs trainers in alternation on one model and one set of data, for sft.py and dpo.py.

Each run is a launch of its own, as a user would start it. Its speed is that of its optimizer steps after the first WARM. The data is made
once, with as many rows as the steps need, so that every trainer sees every row once. The first round runs every contestant; later rounds
run ours, the rival's defaults, and its fastest configuration of the first round. Ratios are taken within a round, and the table shows
their median with the lowest and the highest. Pairs/s counts all pairs alike: a trainer's steps after the first WARM may hold a percent or
two more or less work than the mean. `python benchmarks/side_by_side.py` prints the table of docs/speed.md.
"""

import json
import math
import os
import platform
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
UNITS = {"sft": "tokens_per_second", "dpo": "pairs_per_second"}
WARM = 2  # steps that are not counted
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "H200": 989.4e12, "B200": 2250e12, "A100": 312e12}
PACKAGES = ("posttrain", "torch", "transformers", "deepspeed", "trl", "accelerate")


@dataclass
class Contestant:
    """A trainer with its settings; `shown` describes them in words."""

    name: str
    trainer: str
    shown: str
    options: dict = field(default_factory=dict)
    stays: bool = False  # in all rounds, whatever the first one shows


@dataclass
class Race:
    """Model, data and settings that all contestants share."""

    shown: str  # what is trained, in words
    kind: str  # sft or dpo
    lengths: dict[str, tuple[float, float]]  # mean tokens of each text, and the standard deviation of their logarithm; empty: Given
    longest: int  # a longer text is cut
    model: dict  # settings of the Qwen3 configuration
    batch: int  # examples a step
    steps: int
    ds_config: str
    ranks: int
    rows: int | None = None  # rows of data; None: as many as the steps need
    dtype: str = "bfloat16"  # of weights and activations


class Given(NamedTuple):
    """Rows of a file, as it has them, in place of made-up ones."""

    rows: list[dict]
    tokenizer: str
    vocabulary: int  # how many token ids the tokenizer has
    mean_tokens: float


def draw_rows(file: Path, tokenizer: str, count: int, longest: int) -> Given:
    """Draw so many rows of at most `longest` tokens that SFT can train on, the same ones each time. Raises ValueError where few are."""
    from data_prep.convert import examples_of_rows, parts_of_rows
    from data_prep.examples import SFT, Settings
    from data_prep.formats.rows import file_rows
    from data_prep.shapes.conversations import conversations
    from posttrain.data.chat import ChatFormat
    from posttrain.data.parts import Refused
    from posttrain.data.tokenization import load_tokenizer

    rows = list(file_rows(file))
    loaded = load_tokenizer(tokenizer)
    kind = SFT(ChatFormat(loaded), Settings(longest))
    chunk = parts_of_rows(kind, enumerate(conversations("sft", rows)))
    examples = examples_of_rows(kind, chunk, Counter())
    tokens = {number: result.length for number, result in examples if not isinstance(result, Refused)}
    if len(tokens) < count:
        raise ValueError(f"the race needs {count:,} rows of at most {longest:,} tokens that SFT can train on; {file} has {len(tokens):,}")
    drawn = random.Random(0).sample(sorted(tokens), count)
    return Given([rows[number] for number in drawn], tokenizer, len(loaded), statistics.mean(tokens[number] for number in drawn))


def make_world(race: Race, folder: Path, given: Given | None = None) -> dict:
    """Write a tokenizer, a random model and prepared data into FOLDER, made up unless `given`; returns their sizes."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data_prep.prepare import prepare
    from posttrain.data.prepared import COLUMNS, load_prepared
    from posttrain.data.tokenization import load_tokenizer

    rows, tokenizer = (given.rows, load_tokenizer(given.tokenizer)) if given else _make_up(race, folder)
    source = folder / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    torch.manual_seed(0)
    with torch.device("cuda" if _on_gpu() else "cpu"):  # half a minute of random numbers for 1.7B parameters on a CPU
        model = Qwen3ForCausalLM(Qwen3Config(**race.model, tie_word_embeddings=True)).to(getattr(torch, race.dtype))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    where = ["--source", str(source), "--output_dir", str(folder / race.kind), "--tokenizer", str(folder / "base"), "--val_size", "0"]
    longest = race.model["max_position_embeddings"]
    prepare(race.kind, [*where, "--max_length", str(longest), "--duplicates", "keep"])
    split = load_prepared(str(folder / race.kind), race.kind, "").train
    assert len(split) == len(rows), f"{len(split)} of {len(rows)} rows were kept"
    texts = [name for name in COLUMNS[race.kind] if name in ("input_ids", "prompt", "chosen", "rejected")]
    means = {name: round(sum(map(len, split.table[name])) / len(split), 1) for name in texts}
    return {"parameters": model.num_parameters(), "rows": len(rows), "mean_lengths": means, "trained": int(split.trained.sum())}


def _make_up(race: Race, folder: Path) -> tuple:
    """Return rows of random words, as long as the race asks, and a tokenizer trained on such words in FOLDER."""
    from tiny import train_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choice("bdfghklmnprstvwz") + draw.choice("aeiou") for _ in range(draw.randint(1, 3))) for _ in range(3000)]

    def texts(mean: float, deviation: float, count: int) -> list[str]:
        """`count` texts of random words in random order, whose lengths are evenly spaced quantiles of a log-normal distribution."""
        quantiles = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
        lengths = [mean * math.exp(deviation * quantile - deviation**2 / 2) for quantile in draw.sample(quantiles, count)]
        return [" ".join(draw.choice(words) for _ in range(max(1, min(race.longest, round(length))))) for length in lengths]

    columns = [texts(*shape, race.rows or race.batch * race.steps) for shape in race.lengths.values()]
    rows = [dict(zip(race.lengths, row, strict=True)) for row in zip(*columns, strict=True)]
    (folder / "text.txt").write_text("\n".join(" ".join(draw.sample(words, 40)) for _ in range(2000)), encoding="utf-8")
    return rows, train_tokenizer(folder, vocab_size=5000)


def run_once(race: Race, contestant: Contestant, world: Path, **variables: str) -> dict | str:
    """Launch a contestant, with these environment variables added: its rate, memory and time, or the end of its output if it failed."""
    out = Path(tempfile.mkdtemp(prefix="contestant_", dir=world))
    job = {"trainer": contestant.trainer, "kind": race.kind, "world": str(world), "steps": race.steps}
    job |= {"batch": race.batch, "ds_config": race.ds_config, "dtype": race.dtype, "options": contestant.options}
    port = str(free_port())
    command = [str(ROOT / "benchmarks" / "contestant.py"), str(out), json.dumps(job)]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if not _on_gpu() else {}
    if race.ranks == 1:  # without the launcher, which takes ten seconds to import what it starts
        environment |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, *command]
    else:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(race.ranks), "--master_port", port, *command]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment | os.environ | variables)
    wall = time.perf_counter() - started
    files = [out / f"rank_{rank}.json" for rank in range(race.ranks)]
    if done.returncode or not all(file.exists() for file in files):
        return done.stdout[-3000:]
    ranks = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    shutil.rmtree(out)
    lead = ranks[0]
    seconds = lead["times"][-1] - lead["times"][WARM - 1]
    tokens = sum(sum(rank["tokens"][WARM:]) for rank in ranks)
    steps = len(lead["times"]) - WARM
    rate = {"tokens_per_second": tokens / seconds} if race.kind == "sft" else {"pairs_per_second": race.batch * steps / seconds}
    spread = [round(after - before, 3) for before, after in pairwise(lead["times"])]
    if race.kind == "sft" and (peak := peak_flops()):
        rate["mfu"] = rate["tokens_per_second"] * model_flops(race.model, tokens / steps / race.batch) / peak / race.ranks
    kinds = [name.removeprefix("peak_bytes") for name in lead if name.startswith("peak_bytes")]
    memory = {f"peak_mb{what}": max(rank[f"peak_bytes{what}"] for rank in ranks) / 2**20 for what in kinds}
    result = rate | memory | {"wall_seconds": wall}
    counts = [round(sum(of_step)) for of_step in zip(*(rank["tokens"] for rank in ranks), strict=True)]
    return {name: round(value, 3) for name, value in result.items()} | {"step_seconds": spread, "step_tokens": counts[1:]}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def compete(name: str, race: Race, contestants: list[Contestant], rounds: int, given: Given | None = None) -> None:
    """Run all rounds and print the table; results/NAME.json (NAME_DTYPE.json unless bfloat16) is written after every round."""
    unit, name = UNITS[race.kind], name + suffix(race.dtype)
    world = Path(tempfile.mkdtemp(prefix="posttrain_benchmark_"))
    about = {"machine": machine(), "versions": versions(), "race": vars(race), "data": make_world(race, world, given)}
    runs, failures = {one.name: [] for one in contestants}, {}
    running = list(contestants)
    for number in range(rounds):
        for one in list(running):
            result = run_once(race, one, world)
            if isinstance(result, str):
                failures[one.name] = result
                running.remove(one)
                print(f"round {number + 1}  {one.name:24} did not run: {result[-600:]}", flush=True)
                continue
            runs[one.name].append(result)
            numbers = {key: value for key, value in result.items() if not isinstance(value, list)}
            print(f"round {number + 1}  {one.name:24} " + "  ".join(f"{k} {v:,.3f}" for k, v in numbers.items()), flush=True)
        summary = {one.name: summarise(runs[contestants[0].name], runs[one.name], unit) for one in contestants if runs[one.name]}
        results = about | {"contestants": {one.name: {"settings": one.shown, **one.options} for one in contestants}}
        results |= {"summary": summary, "did_not_run": {name: text[-1500:] for name, text in failures.items()}, "runs": runs}
        (RESULTS / f"{name}.json").write_text(as_text(results), encoding="utf-8")
        fastest = max((one for one in running if one.trainer != "ours"), key=lambda one: runs[one.name][0][unit], default=None)
        running = [one for one in running if one.stays or one is fastest]
    shutil.rmtree(world)
    print(table([results]))


def as_text(results: dict) -> str:
    """JSON with every list of numbers on one line."""
    text = json.dumps(results, indent=2) + "\n"
    return re.sub(r"\[\s+([\d.,\s-]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)


def summarise(first: list[dict], other: list[dict], unit: str) -> dict:
    """Medians of a contestant, and how many times faster the first is than it, round by round."""
    medians = {key: round(statistics.median(run[key] for run in other), 3) for key in other[0] if key in (unit, "peak_mb", "mfu")}
    if ratios := [mine[unit] / theirs[unit] for mine, theirs in zip(first, other, strict=False)]:
        medians["times_faster"] = [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]
    return medians


def table(files: list[dict]) -> str:
    """The results as Markdown, a contestant a line."""
    lines = ["| | trainer | useful work | memory of a rank | posttrain is faster by |", "|---|---|---|---|---|"]
    for results in files:
        unit = UNITS[results["race"]["kind"]]
        for name, values in results["summary"].items():
            middle, least, most = values.get("times_faster", [math.nan] * 3)
            spread = f"{least:.2f} to {most:.2f}" if len(results["runs"][name]) > 1 else "one run"
            factor = "" if name == next(iter(results["summary"])) else f"{middle:.2f} ({spread})"
            rate = f"{values[unit]:,.{(values[unit] < 100) + (values[unit] < 10)}f} {unit.replace('_per_second', '/s')}"
            settings = results["contestants"][name]["settings"]
            lines.append(f"| {results['race']['shown']} | {settings} | {rate} | {values['peak_mb']:,.0f} MB | {factor} |")
    return "\n".join(lines)


def committed() -> list[dict]:
    """The result files in benchmarks/results/ of all races, in the order of docs/speed.md."""
    names = [f"{race}_{device}" for device in ("cpu", "gpu") for race in ("sft", "dpo_ultrafeedback", "dpo_hh")]
    return [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names if (RESULTS / f"{name}.json").exists()]


def model_flops(model: dict, length: float) -> float:
    """FLOPs a token of training, forward and backward, in an example of `length` tokens with causal attention.

    6 for every weight that multiplies (the head too, the embeddings not), and 6 x layers x heads x width x length of attention.
    """
    hidden, width = model["hidden_size"], model["head_dim"]
    heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
    layer = hidden * width * (2 * heads + 2 * kv_heads) + 3 * hidden * model["intermediate_size"]
    multiplied = model["num_hidden_layers"] * layer + model["vocab_size"] * hidden
    return 6 * multiplied + 6 * model["num_hidden_layers"] * heads * width * length


def peak_flops() -> float | None:
    """FLOP/s of the GPU's matrix units in bfloat16 by its data sheet, None for an unknown GPU or none."""
    return next((flops for name, flops in PEAKS.items() if _on_gpu() and name in machine()), None)


def has_room() -> bool:
    """Whether a GPU holds a model of 1.7B parameters in training with 32k tokens without recomputing activations."""
    import torch

    return _on_gpu() and torch.cuda.get_device_properties(0).total_memory > 100e9


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def dtype_of_cpu() -> str:
    """The dtype to measure in on this CPU: without instructions for bfloat16 torch multiplies that tens of times slower than float32."""
    import torch

    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def suffix(dtype: str) -> str:
    """What the name of a result file ends with."""
    return "" if dtype == "bfloat16" else f"_{dtype}"


def machine() -> str:
    """The device in words."""
    import torch

    if _on_gpu():
        return torch.cuda.get_device_name()
    extensions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {extensions}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    """Versions of the packages that matter to speed."""
    return {name: version(name) for name in PACKAGES}


if __name__ == "__main__":
    print(table(committed()))
