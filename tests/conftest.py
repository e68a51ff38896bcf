"""Fixtures: real development data where it exists, and a tiny world that every test machine can make for itself."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from tiny import make_tiny

from posttrain.operators import layers
from posttrain.run.health import Facts

ROOT = Path(__file__).resolve().parents[1]
# started in the background by a shell that is no terminal's, this process ignores SIGINT, and so would every rank that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take minutes, the longest first: launch/test.sh gives whole files to two workers in this order, so that both end together
LONG = (
    "benchmarks evaluate two_hosts install plan launch docs faults moved layouts real_data setup checkpoint compile fuzz_folders planted "
    "fit runs fuzz_runs fuzz stopping contributing export strangers terminal serving_parts kubernetes doctor serve data_prep tracking page"
)


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": place for place, name in enumerate(LONG.split())}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real development data: $POSTTRAIN_SHARED_DATA, or ../shared/data beside the repository."""
    path = Path(os.environ.get("POSTTRAIN_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set POSTTRAIN_SHARED_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A random model with its tokenizer and prepared data, see tiny.py."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def wide(tiny, tmp_path_factory) -> list[str]:
    """Arguments for a model whose activations, some 260 KB a token, are most of what it takes; and rows that are long."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from data_prep.prepare import prepare

    folder = tmp_path_factory.mktemp("wide")
    draw = random.Random(0)
    rows = [{"instruction": f"repeat {n}", "output": " ".join(draw.choices(tiny.words, k=draw.randint(20, 35)))} for n in range(130)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare("sft", ["--source", f"{folder}/rows.jsonl", "--output_dir", f"{folder}/sft", "--tokenizer", tiny.base, "--val_size", "2"])
    shutil.copytree(tiny.base, folder / "base")
    config = AutoConfig.from_pretrained(tiny.base)
    config.intermediate_size = 8192
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    numbers = ["--max_iters=3", "--global_batch_size=64", "--warmup_iters=0", "--eval_interval=0", "--dtype=float32", "--save_interval=0"]
    return [f"--checkpoint_path={folder}/base", f"--sft_data_dir={folder}/sft", *numbers]


@pytest.fixture(scope="session")
def cpu_adam() -> None:
    """DeepSpeed's Adam for offload, compiled: in a new environment that takes minutes, which no time limit of a launch shall count."""
    from posttrain.engine.cpu_adam import load_cpu_adam

    load_cpu_adam()


def pytest_configure(config):
    """One warm process for the session: the workers of pytest-xdist find the controller's in the environment."""
    if not hasattr(config, "workerinput"):
        warm.own()


def launch(script: str, *arguments: str, ranks: int = 2, timeout: float = 300, **how) -> subprocess.CompletedProcess:
    """Run a script on so many ranks, forked from the warm process, and return what it printed (both streams in stdout)."""
    return warm.run(script, *arguments, ranks=ranks, port=free_port(), timeout=timeout, **how)


def start(script: str, *arguments: str, ranks: int = 2, **how) -> warm.Started:
    """Start what `launch` runs to its end."""
    return warm.start(script, *arguments, ranks=ranks, port=free_port(), **how)


def python(script: str, *arguments: str, timeout: float = 300, **how) -> subprocess.CompletedProcess:
    """Run a script as `python SCRIPT` does, forked from the warm process if there is one; both streams in stdout, or `separate`."""
    if warm.is_there():
        return warm.run(script, *arguments, timeout=timeout, **how)
    errors = subprocess.PIPE if how.pop("separate", False) else subprocess.STDOUT
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, timeout=timeout, stdout=subprocess.PIPE, stderr=errors, text=True, **({"env": rank_environment()} | how))


def launch_with_deepspeed(script: str, *arguments: str, ranks: int = 2, timeout: float = 300, env=None) -> subprocess.CompletedProcess:
    """Run a script under the real deepspeed launcher, with interpreters of its own: where they are what is tested."""
    command = launch_command(script, *arguments, ranks=ranks)
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, timeout=timeout, env=env or rank_environment(), **merged)


def launch_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of launch/ from another directory on two ranks, as a user would."""
    command = ["bash", str(ROOT / "launch" / name), *arguments]
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd="/", timeout=300, env=rank_environment() | {"NUM_GPUS": "2"} | environment, **merged)


def last_of_each(arguments: list[str]) -> list[str]:
    """Of settings given twice the last, as a command line may hold each once only."""
    return list({argument.split("=")[0]: argument for argument in arguments}.values())


def launch_command(script: str, *arguments: str, ranks: int) -> list[str]:
    """The user's command, under the real deepspeed launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    return [*launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), str(ROOT / script), *map(str, arguments)]


def free_port() -> int:
    """Below the ports that the system gives to outgoing connections: one of another test's would have it before the ranks listen."""
    draw = random.SystemRandom()  # hypothesis seeds the other one, alike in all workers
    while True:
        port = draw.randint(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def rank_environment() -> dict[str, str]:
    return os.environ | warm.ON_CPU


@pytest.fixture
def cpu_has_bfloat16(monkeypatch):
    """Call it with whether this CPU is to seem to have instructions for bfloat16."""

    def seem(has: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
        layers.multiplies_in_float32.cache_clear()

    yield seem
    layers.multiplies_in_float32.cache_clear()


def start_run(run, first_step: int, total_steps: int) -> None:
    """Of a run.Run without a model or data."""
    tokens = {"per_epoch": 1, "trained_per_epoch": 1, "longest": 1}
    manifest = {
        "counts": {"train": 1, "validation": 0},
        "rows": 1,
        "sources": [],
        "tokens": tokens,
        "ledger": {},
        "changes": {},
        "notes": [],
    }
    facts = Facts(1, 1, 0, 1.0, 1.0)
    run.start(first_step, total_steps, describe_model=lambda folder: None, manifest=manifest, facts=facts, states={})


def metrics(run: Path, split: str = "train") -> list[dict]:
    """The records of a run's metrics.jsonl."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, Debian's where it is not there yet and can be installed.

    Of one module: as long as it is there playwright's event loop runs in this thread, and no test can run one of its own.
    """
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip("needs Chromium; as root on Debian it is installed")
        quiet = {"stdout": subprocess.DEVNULL, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
        subprocess.run(["apt-get", "update", "-qq"], check=True, **quiet)
        subprocess.run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", "chromium", "fonts-dejavu"], check=True, **quiet)
        found = shutil.which("chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()
