# ruff: noqa: E402
"""What to look at in the first ten minutes on a GPU: python benchmarks/first_minutes.py [PART ...] [--dry] [--out FILE]

versions     torch, CUDA, driver, GPU and packages
layers       which kernels are chosen for one layer of three models' shapes, and what the trial takes
attention    each flash attention that is installed beside the exact one: time and difference, forward and backward
tests        tests/test_gpu.py
repeats      a small SFT run twice, and once resumed: whether curve and weights are the same bits, with and without --deterministic
steps        some steps of 1.7B parameters by liger-kernel and compiled, with and without expandable segments
shards       memory of rank 0 of 8 beside the plan, on this device, in torch's fake process group: it computes, and sends nothing
quickstart   two checkpoints measured on a benchmark and on pairs, then served

Each part is a process of its own with a time limit, so that one that hangs or fails loses nothing: what a part has found until then is
written to FILE, results/first_minutes_gpu.json. Time that a part leaves goes to the next ones. --dry tries the parts on a CPU with tiny
shapes and prints what they find; its figures mean nothing.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests"))

import torch

from benchmarks.server_process import MODEL, PROMPTS, ask, running
from benchmarks.sft import ON_GPU, RACES
from benchmarks.side_by_side import PACKAGES, RESULTS, Contestant, Race, as_text, free_port, machine, make_world, run_once
from posttrain.planning.shapes import SHAPES, Shape

DRY_PATIENCE = 10  # times the limits, on a CPU that others may use as well
STEPS, STOP = 6, 3  # of the runs that are repeated, and after how many of them one stops
RANKS = 8
KERNEL_PACKAGES = ("liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4", "triton", "cut-cross-entropy", "lm_eval")
QWEN25 = Shape("Qwen2.5-7B", "Qwen2Config", 3584, 18944, 28, 28, {"vocab_size": 152064, "num_key_value_heads": 4})
# the most telling tests first: all of them may take longer than there is time
TELLING = "kernels or (sft and (zero1 or zero3_compile or offload)) or (dpo and (precompute or prompt_twice))"
LIGER = {"max_tokens_per_gpu": 16384, "activation_checkpointing": "none"}
COMPILED = LIGER | {"compile": True}
LARGER = COMPILED | {"max_tokens_per_gpu": 32768}
WAYS_TO_STEP = [(LIGER, False), (LIGER, True), (LARGER, False), (LARGER, True), (COMPILED, False)]  # and whether segments can expand
Rows = Iterator[tuple[str, object]]


class Here(NamedTuple):
    """Where a part runs: with tiny shapes or not, and a folder for all parts of a call."""

    dry: bool
    work: Path

    def race(self) -> Race:
        """The race whose model `steps` and `shards` train: four steps, of which two are measured."""
        return replace(RACES["dry" if self.dry else "gpu"], steps=4)

    def world(self) -> Path:
        """The folder of that race's model and data, made by the first part that asks."""
        folder = self.work / "world"
        if not (folder / "sft").exists():  # it is written last, and whole
            folder.mkdir(exist_ok=True)
            make_world(self.race(), folder)
            torch.cuda.empty_cache()  # the model was made on the GPU, which other processes need now
        return folder


def versions(here: Here) -> Rows:
    """What is installed, beside the packages that every part notes."""
    yield "python", sys.version.split()[0]
    yield "cuda", torch.version.cuda
    yield "cores", len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        yield "gpu", {"memory_gb": round(properties.total_memory / 1e9, 1), "capability": f"{properties.major}.{properties.minor}"}
        yield "cudnn", torch.backends.cudnn.version()
        yield "nccl", ".".join(map(str, torch.cuda.nccl.version()))
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        yield "driver, clock and power limit", subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def measured(action: Callable[[], str]) -> dict:
    """What an action chooses, its seconds, and the GPU's memory: allocated before, after and at most, and what torch reserves then."""
    torch.cuda.empty_cache()
    before, _, started = torch.cuda.memory_allocated(), peak_gb(), time.perf_counter()
    found = {"chosen": action(), "seconds": round(time.perf_counter() - started, 2), "peak_gb": peak_gb()}
    sizes = {"before": before, "after": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return found | {f"{name}_gb": round(size / 1e9, 3) for name, size in sizes.items()}


def layers(here: Here) -> Rows:
    """Choose the kernels of one layer of each shape, as a run does at its start."""
    from transformers import AutoModelForCausalLM

    from benchmarks.kernels import DEVICE
    from posttrain.operators import attention, layers

    for shape in (SHAPES["1.8b"], SHAPES["8b"], QWEN25):
        shape = shape._replace(depth=1)
        if here.dry:
            others = shape.others | {"vocab_size": 512, "num_key_value_heads": 2}
            shape = shape._replace(hidden=128, feed_forward=256, heads=4, others=others)
        with DEVICE:
            model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16, trust_remote_code=False)
        config = model.config
        for name, choose in (
            ("layer", lambda model=model: layers.choose(model, "auto", False, DEVICE)[0]),
            ("attention", lambda config=config: ": ".join(attention.choose("auto", DEVICE, torch.bfloat16, 0.0, config))),
        ):
            yield f"{shape.name}, {name}", measured(choose)


def attention(here: Here) -> Rows:
    """Compare attention as kernels.py does, in which the exact one comes first."""
    from benchmarks import kernels

    kernels.PATIENCE = 1 if here.dry else 5
    yield from kernels.attentions(kernels.matrix_limit()).items()


def tests(here: Here) -> Rows:
    """Run the tests of what only a GPU runs, and note each one's outcome and the seconds since the last."""
    for chosen in (TELLING, f"not ({TELLING})"):
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", chosen, "tests/test_gpu.py"]
        said, last = [], time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as running_tests:
            assert running_tests.stdout
            for line in running_tests.stdout:
                said.append(line)
                if found := re.match(r"tests/test_gpu\.py::(\S+) ([A-Z]{4,}\b(?: \(.*\))?)", line):
                    yield found[1], f"{found[2]} in {time.monotonic() - last:.1f} s"
                    last = time.monotonic()
        failed = running_tests.returncode not in (0, 5)
        yield f"-k '{chosen}'", "".join(said)[-6000:] if failed else said[-1].strip("= \n")


def run(script: str, *arguments: object) -> dict:
    """Run a script of the repository as a user would: its seconds, and how it ended where it failed."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    result: dict = {"seconds": round(time.perf_counter() - started, 1)}
    return result | ({"exit_code": done.returncode, "output": done.stdout[-1500:]} if done.returncode else {})


def together(commands: dict[str, tuple]) -> dict[str, dict]:
    """Run scripts side by side, as many as there are cores for, and return what `run` says of each."""
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        return dict(zip(commands, pool.map(lambda command: run(*command), commands.values()), strict=True))


def repeats(here: Here) -> Rows:
    """Train twice, and a third time in two parts; all by posttrain/sft.py, several at a time."""
    shape = RACES["dry" if here.dry else "cpu"].model
    lengths = {"instruction": (30, 0.1), "output": (60 if here.dry else 1500, 0.3)}
    race = Race("SFT, repeated", "sft", lengths=lengths, longest=2000, model=shape, batch=8, steps=STEPS, **ON_GPU)
    folder = Path(tempfile.mkdtemp(dir=here.work))
    make_world(race, folder)
    common = [f"--checkpoint_path={folder}/base", f"--sft_data_dir={folder}/sft", "--global_batch_size=8", "--max_tokens_per_gpu=4096"]
    common += ["--eval_interval=0", "--save_interval=0", f"--lr_decay_iters={STEPS}"]
    common += [f"--ds_config={race.ds_config}", "--activation_checkpointing=none"]
    modes = {"as usual": [], "deterministic": ["--deterministic=True"]}

    def sft(name: str, mode: str, steps: int, *more: str) -> tuple:
        return ("posttrain/sft.py", *common, *modes[mode], f"--out_dir={folder}/{mode}/{name}", f"--max_iters={steps}", *more)

    names = [(name, mode) for mode in modes for name in ("first", "second", "resumed")]
    runs = together({f"{mode}, {name}": sft(name, mode, STOP if name == "resumed" else STEPS) for name, mode in names})
    runs |= together({f"{mode}, resumed after {STOP} steps": sft("resumed", mode, STEPS, "--extend=True") for mode in modes})
    yield "runs", runs
    for mode in modes:
        for name in ("second", "resumed"):
            yield f"{mode}, first and {name}", difference(folder / mode / "first", folder / mode / name)


def difference(one: Path, other: Path) -> dict | str:
    """How far two runs' losses, gradient norms and final weights are from each other; 0 where all are the same bits."""
    from safetensors.torch import load_file

    if not all((run / "final").is_dir() for run in (one, other)):
        return "did not run"
    curves, weights = [], []
    for place in (one, other):
        lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if record["split"] == "train"]
        curves.append({(record["step"], name): record[name] for record in records for name in ("loss", "grad_norm")})
        files = sorted((place / "final").glob("*.safetensors"))
        weights.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    assert curves[0].keys() == curves[1].keys() and weights[0].keys() == weights[1].keys() and curves[0] and weights[0]
    of_curves = {key: abs(value - curves[1][key]) for key, value in curves[0].items()}
    first = next((step for (step, _), far in of_curves.items() if far), None)
    of_weights = max((tensor.float() - weights[1][name].float()).abs().max().item() for name, tensor in weights[0].items())
    return {"losses and norms": max(of_curves.values()), "weights": of_weights, "first step that differs": first}


def steps(here: Here) -> Rows:
    """Train a few steps in each way; each is a launch of its own."""
    world = here.world()
    for options, expandable in WAYS_TO_STEP:
        kernels = "compiled" if "compile" in options else "liger"
        name = f"{kernels}, {options['max_tokens_per_gpu']:,} tokens, expandable segments {'on' if expandable else 'off'}"
        setting = {"PYTORCH_ALLOC_CONF": f"expandable_segments:{expandable}"}
        result = run_once(here.race(), Contestant("ours", "ours", "", options), world, **setting)
        yield name, {"did_not_run": result[-1500:]} if isinstance(result, str) else result


def shards(here: Here) -> Rows:
    """Hold what one of RANKS ranks holds at each ZeRO stage, each in a process of its own."""
    world = here.world()
    for ds_config in ("zero1", "zero2", "zero3"):
        with multiprocessing.get_context("spawn").Pool(1) as apart:
            try:
                found = apart.apply(shard, (ds_config, str(world), here.dry))
            except RuntimeError as error:  # such as too little memory, which the next stage needs less of
                found = {"did_not_run": f"{type(error).__name__}: {error}"[:500]}
            yield f"{ds_config}, {RANKS} ranks", found


def shard(ds_config: str, world: str, dry: bool) -> dict:
    """Train two steps as rank 0; return the peak of its memory, that until they begin, and the plan's."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    from tiny import build_training
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from posttrain.planning.machines import this_machine
    from posttrain.planning.planner import Planner, Way
    from posttrain.training.step import train_step

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    tokens, way = 512 if dry else 8192, Way(f"ds_configs/{ds_config}.json", "none")
    recipe = {"out_dir": "run", "max_iters": 2, "global_batch_size": 64, "max_tokens_per_gpu": tokens, "ds_config": way.ds_config}
    recipe["activation_checkpointing"] = way.checkpointing
    training = build_training(world, "sft", recipe)
    before = peak_gb()
    for step in (1, 2):
        train_step(training, step)
    planned = Planner(training.recipe, this_machine(RANKS), RANKS, 1).parts(way, tokens).total
    return {"until_training_gb": before, "peak_gb": peak_gb(), "planned_gb": round(planned / 1e9, 3)}


def peak_gb() -> float | None:
    """The most memory that torch has allocated since the last call; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return round(peak / 1e9, 3)


def quickstart(here: Here) -> Rows:
    """Train the quickstart's base model a little, then measure and serve both by the package's commands."""
    out, few = Path(tempfile.mkdtemp(dir=here.work)), 20
    yield "world", run("launch/quickstart/world.py", out / "world")
    common = ("--tokenizer", MODEL, "--max_samples", 400, "--val_size", 2 * few, "--duplicates", "keep")
    prepared = {kind: ("--source", out / "world" / f"{kind}.jsonl", "--output_dir", out / kind, *common) for kind in ("sft", "dpo")}
    yield "preparation", together({kind: (f"data_prep/prepare_{kind}.py", *options) for kind, options in prepared.items()})
    recipe = {"checkpoint_path": MODEL, "sft_data_dir": out / "sft", "out_dir": out / "run", "max_iters": 2 if here.dry else 50}
    recipe |= {"global_batch_size": 32, "learning_rate": 5e-4, "eval_interval": 0, "save_interval": 0}
    yield "sft", run("posttrain/sft.py", *(f"--{name}={value}" for name, value in recipe.items()))

    (out / "items").mkdir()
    choices_of = [{"text": [f"{n}", f"{n + 1}"], "label": ["A", "B"]} for n in range(few)]
    items = [{"question": f"{n} + 1 = ?", "choices": given, "answerKey": "B"} for n, given in enumerate(choices_of)]
    (out / "items" / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    base, sft = ("--checkpoint", f"base={MODEL}"), ("--checkpoint", f"sft={out}/run")
    limit, pairs = ("--max_samples", few), ("--reference", f"base={MODEL}", "--pairs", out / "dpo")
    asked = ("--benchmark", "arc_easy", "--data", out / "items", *limit, "--output", out / "evaluation")
    measures = {
        "eval_benchmarks": (*base, *sft, *asked),
        "eval_preferences": (*sft, *pairs, *limit, "--output", out / "preferences"),
    }
    yield from together({name: (f"posttrain/{name}.py", *options) for name, options in measures.items()}).items()
    for file in (out / "evaluation" / "results.json", out / "preferences" / "reward_accuracy.json"):
        if file.exists():
            yield file.stem, json.loads(file.read_text(encoding="utf-8"))
    port, started = free_port(), time.perf_counter()
    with running([sys.executable, str(ROOT / "posttrain" / "serve.py"), *base, *sft, "--port", str(port)], port):
        yield "seconds until the server answers", round(time.perf_counter() - started, 1)
        for name in ("base", "sft"):
            yield f"served, {name}", asyncio.run(answer(port, name))


async def answer(port: int, name: str) -> dict:
    """Ask a served model twice, the first time to warm it up: what it says, and when."""
    import httpx

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(2):
            said = await ask(client, name, PROMPTS[0], 32)
    return {"text": said["text"], "first_token_ms": round(1000 * said["first"]), "tokens": said["pieces"]}


PARTS: dict[str, tuple[Callable[[Here], Rows], int]] = {  # and the seconds of each
    "versions": (versions, 20),
    "layers": (layers, 50),
    "attention": (attention, 60),
    "tests": (tests, 130),
    "repeats": (repeats, 70),
    "steps": (steps, 130),
    "shards": (shards, 50),
    "quickstart": (quickstart, 60),
}


def installed() -> dict[str, str]:
    """Versions of the packages that matter here, as far as they are installed."""
    found = {}
    for name in (*PACKAGES, *KERNEL_PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def alone(part: str, here: Here) -> None:
    """Run a part in this process, and write what it has found after each row."""
    about, rows = {"machine": machine(), "versions": installed()}, {}
    file = here.work / f"{part}.json"
    for name, value in PARTS[part][0](here):
        rows[name] = value
        print(f"{name}: {value}", flush=True)
        file.with_suffix(".new").write_text(json.dumps({"about": about, "rows": rows}), encoding="utf-8")
        file.with_suffix(".new").replace(file)  # it may be killed at any time


def attempt(part: str, here: Here, limit: float) -> tuple[dict, dict]:
    """Run a part in a process of its own for `limit` seconds at most: what it says of the machine, and what it found."""
    command = [sys.executable, __file__, part, "--alone", str(here.work), *(["--dry"] if here.dry else [])]
    log, started = here.work / f"{part}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        environment = os.environ | {"TMPDIR": str(here.work)}  # what a part leaves is removed with the folder
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            outcome = f"exit code {code}" if (code := process.wait(limit)) else "done"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it has started
            process.wait()
    file = here.work / f"{part}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"about": {}, "rows": {}}
    result = {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}
    if outcome != "done":
        result["output"] = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    return found["about"], result | found["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--dry", action="store_true", help="on a CPU with tiny shapes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of results/first_minutes_gpu.json; a dry run writes none else")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        sys.exit(f"first_minutes.py: there is no part {unknown[0]}; there are {', '.join(PARTS)}")
    if not options.dry and not torch.cuda.is_available():
        sys.exit("first_minutes.py: there is no GPU that torch can use; try the parts with --dry")
    if options.alone:
        return alone(options.parts[0], Here(options.dry, options.alone))
    file = options.out or (None if options.dry else RESULTS / "first_minutes_gpu.json")
    results = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    ahead = 0.0  # seconds that the parts so far have left
    with tempfile.TemporaryDirectory(prefix="posttrain_first_minutes_") as work:
        for part in options.parts or PARTS:
            limit = PARTS[part][1] * (DRY_PATIENCE if options.dry else 1) + ahead
            about, found = attempt(part, Here(options.dry, Path(work)), limit)
            ahead = max(0.0, limit - found["seconds"])
            if about and about != results.get("about"):  # of another machine, or other versions
                results = {"about": about, "parts": {}}
            results.setdefault("parts", {})[part] = found
            print(f"{part}: {as_text(found)}", flush=True)
            if file:
                file.write_text(as_text(results), encoding="utf-8")


if __name__ == "__main__":
    main()
