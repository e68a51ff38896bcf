"""The commands without the checkout: what they import before they parse, a Python without packages, and an installed wheel."""

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from conftest import ROOT, launch_with_deepspeed, rank_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_runs import sft_arguments

from posttrain.cli import console
from posttrain.cli.console import split_launcher
from posttrain.common.places import COMMANDS

SCRIPTS = [*dict(COMMANDS.values()), "posttrain/cli/console.py"]
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "pyarrow", "pandas", "numpy", "lm_eval", "starlette", "matplotlib"}
ROWS = [{"instruction": f"repeat {number}", "output": f"pa ta {number} ka"} for number in range(40)]
PAIRS = [{"prompt": f"say {number}", "chosen": f"pa {number}", "rejected": f"ta ta {number}"} for number in range(24)]


def imported(*command: object, cwd=None) -> tuple[set[str], subprocess.CompletedProcess]:
    """The top-level modules that a command imports, and what it says; the interpreter itself tells them."""
    environment = rank_environment() | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, cwd=cwd, timeout=120)
    return set(re.findall(r"^import time:.*\| +([\w]+)", done.stderr, re.M)), done


# ---- parsing comes first ----

MISTAKES = [
    ("posttrain/sft.py", ["--lerning_rate=1"], "Did you mean learning_rate?"),
    ("posttrain/sft.py", ["nowhere.yaml"], "no recipe at nowhere.yaml"),
    ("posttrain/sft.py", ["--checkpoint_path=BASE", "--sft_data_dir=nowhere"], "there is no prepared data at nowhere"),
    ("posttrain/dpo.py", ["--dpo_data_dir=DPO", "--sft_checkpoint_path=./nowhere"], "there is no model at ./nowhere"),
    ("posttrain/dpo.py", ["--ds_config=ds_configs/zero9.json"], "Did you mean ds_configs/zero"),
    ("posttrain/plan.py", ["--gpu=5099"], "--gpu=5099 is not one of"),
    ("posttrain/plan.py", ["Qwen/Qwen3-8B"], "Give a model as --checkpoint_path=Qwen/Qwen3-8B"),
    ("posttrain/serve.py", ["--checkpoint", "nowhere"], "there is no model at nowhere"),
    ("posttrain/serve.py", ["--checkpont", "nowhere"], "--checkpont: Did you mean --checkpoint?"),
    ("posttrain/eval_benchmarks.py", ["--checkpoint", "BASE", "--benchmark", "arc_esy"], "there is no benchmark 'arc_esy'"),
    ("posttrain/convert.py", ["nowhere", "there"], "there is no model at nowhere"),
    ("data_prep/prepare_sft.py", ["--dataset", "alpca", "--tokenizer", "BASE", "--output_dir", "new"], "Did you mean alpaca?"),
    ("data_prep/prepare_dpo.py", ["--dataset", "nowhere.jsonl", "--tokenizer", "BASE", "--output_dir", "new"], "no such file"),
    ("data_prep/preview.py", ["nowhere"], "there is no prepared data at nowhere"),
    ("launch/doctor/doctor.py", ["--lerning_rate=1"], "Did you mean learning_rate?"),
    ("posttrain/cli/console.py", ["stf"], "unknown command 'stf'. Did you mean sft?"),
    ("posttrain/cli/console.py", ["sft", "--num_gpus", "2", "--lerning_rate=1"], "Did you mean learning_rate?"),
]


def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(tiny, tmp_path):
    """Importing it takes seconds. The scripts and the modules that they import then are told apart by the interpreter."""

    def ask(script: str, words: list[str], says: str, code: int) -> None:
        swaps = {"BASE": tiny.base, "DPO": tiny.dpo}
        words = [re.sub("BASE|DPO", lambda found: swaps[found[0]], word) for word in words]
        seen, done = imported(sys.executable, ROOT / script, *words, cwd=tmp_path)
        told = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("import time:"))
        assert (says in told, done.returncode, sorted(seen & HEAVY)) == (True, code, []), (script, words, told)
        assert "Traceback" not in told
        assert "argparse" in seen or script != "posttrain/serve.py"  # the list is really read

    asked = [(script, ["--help"], "--", 0) for script in SCRIPTS] + [(*mistake, 2) for mistake in MISTAKES]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: ask(*one), asked))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_help_under_the_launcher_is_printed_once():
    done = launch_with_deepspeed("posttrain/sft.py", "--help")
    assert (done.returncode, done.stdout.count("--learning_rate=")) == (0, 1), done.stdout


# ---- what is installed ----

OPTIONAL = {"liger_kernel", "vllm", "wandb", "nltk"}  # each is missed with a message of its own, or with the extra that names it


def _closure(names: set[str]) -> set[str]:
    """Distributions that these need, of those that are installed, without extras that nobody asks for."""
    found, todo = set(), {(canonicalize_name(name), extra) for name in names for extra in ("", "ifeval")}
    while todo:
        found.add(one := todo.pop())
        with contextlib.suppress(PackageNotFoundError):
            for text in requires(one[0]) or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": one[1]}):
                    todo |= {(canonicalize_name(needed.name), extra) for extra in ("", *needed.extras)} - found
    return {name for name, _ in found}


def test_what_is_imported_is_installed_with_the_package():
    """Not by the extra for tests alone, in whose environment all else is tested."""
    setup = ast.parse((ROOT / "setup.py").read_text())
    (listed,) = [ast.literal_eval(one.value) for one in ast.walk(setup) if isinstance(one, ast.keyword) and one.arg == "install_requires"]
    there = _closure({Requirement(text).name for text in listed})
    owners, missing = packages_distributions(), set()
    for path in [*(ROOT / "posttrain").rglob("*.py"), *(ROOT / "data_prep").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OPTIONAL - {"posttrain", "data_prep"}:
                if not {canonicalize_name(owner) for owner in owners.get(top, ())} & there:
                    missing.add(top)
    assert not missing
    assert "accelerate" in there  # lm_eval's models import it


# ---- a Python without packages ----


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """An interpreter that has the standard library only."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("script", ["posttrain/sft.py", "posttrain/serve.py", "data_prep/prepare_dpo.py", "launch/doctor/doctor.py"])
def test_a_forgotten_environment_is_three_lines(bare, script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([bare, ROOT / script, "--keys", "1"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 3), done.stderr
    assert re.match(rf"error: this Python, {bare}, lacks the package \w+\.", done.stderr)
    assert f"    source {ROOT}/launch/env.sh" in done.stderr


def test_an_old_python_is_told_so(bare, tmp_path):
    """Up to that message all files can be read by Python 3.8: parsed here, and run under a version that is set back."""
    code = (
        "import sys, runpy; sys.version_info = (3, 8, 1); sys.path[0] = 'x'; sys.argv = ['sft.py'];"
        f"hook = lambda event, args: event == 'open' and str(args[0]).startswith({str(ROOT)!r}) and print(args[0]);"
        f"sys.addaudithook(hook); runpy.run_path({str(ROOT / 'posttrain/sft.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([bare, "-X", f"pycache_prefix={tmp_path}", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.startswith("error: this is Python 3.8 (") and "needs 3.11 or newer" in done.stderr, done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr
    read = {Path(line) for line in done.stdout.splitlines() if line.endswith(".py")} | {ROOT / script for script in SCRIPTS}
    assert ROOT / "posttrain" / "parallel" / "script.py" in read
    for path in read:
        ast.parse(path.read_text(), feature_version=(3, 8))


# ---- a wheel ----


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder, far from the checkout, whose environment has the wheel and, by a .pth file, the packages that tests run with."""
    place = tmp_path_factory.mktemp("with a wheel, für alle")
    source = place / "source"
    for name in ("posttrain", "data_prep", "ds_configs", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # else what lies there counts as installed
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "env": bare, "cwd": place}
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, source], **quiet)
    shutil.rmtree(source)
    venv.create(place / "env", symlinks=True)
    (wheel,) = place.glob("*.whl")
    subprocess.run([*pip, "--python", place / "env", "install", "--no-deps", wheel], **quiet)
    (site,) = (place / "env").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


def environment_of(installed: Path) -> dict[str, str]:
    """The environment in which a command of the installed wheel runs: nothing in it leads to the checkout."""
    path = f"{installed / 'env' / 'bin'}:{os.environ['PATH']}"
    return {name: value for name, value in rank_environment().items() if name != "PYTHONPATH"} | {"PATH": path}


def posttrain(installed: Path, *words: object, code: int = 0) -> str:
    """Run `posttrain` there; returns what it says."""
    command = [installed / "env" / "bin" / "posttrain", *map(str, words)]
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=environment_of(installed), cwd=installed, timeout=300, **merged)
    assert done.returncode == code, done.stdout
    assert str(ROOT / "posttrain") not in done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_console_commands_of_a_wheel(installed, tiny):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", posttrain(installed, "--version"))
    told = posttrain(installed)
    assert all(f"  {name} " in told for name in COMMANDS)
    for name in COMMANDS:
        assert "posttrain" in posttrain(installed, name, "--help")
    assert "posttrain sft --num_gpus 8 [RECIPE.yaml]" in posttrain(installed, "sft", "--num_gpus", "2", "--help")
    (installed / "my rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    told = posttrain(installed, "sft", f"--checkpoint_path={tiny.base}", "--sft_data_dir=my rows.jsonl", code=2)
    command = f"posttrain prepare-sft --dataset 'my rows.jsonl' --tokenizer {tiny.base} --output_dir 'data/my rows'"
    assert f"holds rows that are not prepared yet. Prepare them, and name the folder that this makes:\n    {command}\n" in told
    assert "all is well" in posttrain(installed, "doctor", f"--checkpoint_path={tiny.base}", f"--sft_data_dir={tiny.sft}")


NOTEBOOK = """
import asyncio, json, sys
from posttrain import dpo, prepare, sft

async def cell(base):
    data = prepare("sft", dataset="rows.jsonl", tokenizer=base, output_dir="data/rows")
    try:
        sft("small.yaml", sft_data_dir="data/nowhere", num_gpus=2)
    except RuntimeError as error:
        assert "there is no prepared data at data/nowhere" in str(error) and "posttrain prepare-sft" in str(error), error
    run = sft("small.yaml", sft_data_dir=data, num_gpus=2)
    pairs = prepare("dpo", dataset="pairs.jsonl", tokenizer=run.final, output_dir="data/pairs")
    run = dpo(dpo_data_dir=pairs, sft_checkpoint_path=run.final, out_dir="runs/dpo", max_iters=2, global_batch_size=4, dtype="float32",
              eval_interval=0, warmup_ratio=None)
    import posttrain
    assert posttrain.dpo is dpo
    try:
        import posttrain.sft
    except ImportError as error:
        assert "from posttrain import sft" in str(error)
    assert posttrain.sft is sft
    print("RESULT", json.dumps([str(run.final), [record["step"] for record in run.metrics if record["split"] == "train"]]))

asyncio.run(cell(sys.argv[1]))  # a notebook's cell runs within an event loop
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_runs_from_python_with_a_wheel(installed, tiny):
    """Rows to SFT on two ranks, under DeepSpeed's launcher, to DPO: by the functions, which use the commands."""
    (installed / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (installed / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    values = {"checkpoint_path": tiny.base, "out_dir": "runs/sft", "max_iters": 2, "global_batch_size": 4, "eval_interval": 0}
    values |= {"dtype": "float32", "ds_config": "ds_configs/zero2.json"}
    (installed / "small.yaml").write_text(json.dumps(values))
    (installed / "cell.py").write_text(NOTEBOOK)
    command = [installed / "env" / "bin" / "python", "cell.py", tiny.base]
    done = subprocess.run(command, env=environment_of(installed), cwd=installed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.split("RESULT ")[1]) == ["runs/dpo/final", [1, 2]]
    assert json.loads((installed / "runs" / "sft" / "run.json").read_text())["starts"][0]["ranks"] == 2
    assert "train on it with: posttrain sft --sft_data_dir=data/rows" in done.stdout
    assert "posttrain dpo --num_gpus 2 --sft_checkpoint_path=runs/sft/final" in done.stdout


@pytest.mark.slow
def test_an_interrupt_of_a_cell_lets_the_run_save(tiny, tmp_path):
    words = dict(word.removeprefix("--").split("=") for word in sft_arguments(tiny, tmp_path / "run", "--max_iters=2000"))
    code = f"from posttrain import sft; sft(**{words!r})"
    environment = rank_environment() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as cell:
        for line in cell.stdout:
            if line.startswith("step 2/"):
                cell.send_signal(signal.SIGINT)
                break
        told = cell.stdout.read()
    assert "All is saved; the same command goes on with step" in told
    assert told.rstrip().endswith("KeyboardInterrupt")
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_run_saves_when_the_notebook_is_gone_and_one_that_stopped_early_is_not_taken_for_finished(tiny, tmp_path):
    words = dict(word.removeprefix("--").split("=") for word in sft_arguments(tiny, tmp_path / "run", "--max_iters=2000"))
    words["save_interval"] = "0"  # so what is saved is saved at the end
    environment = rank_environment() | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"from posttrain import sft; sft(**{words!r})"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as cell:
        next(line for line in cell.stdout if line.startswith("step 2/"))
        cell.kill()
    deadline = time.monotonic() + 60
    while not (saved := list((tmp_path / "run" / "checkpoints").glob("step_??????"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again = [sys.executable, "-c", f"from posttrain import sft; sft(time_limit='1s', **{words!r})"]
    while "is in use by another process" in (done := subprocess.run(again, capture_output=True, text=True, env=environment)).stdout:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert "RuntimeError: posttrain sft saved and stopped before its last step" in done.stderr, done.stdout
    assert f"continuing after step {int(saved[0].name.removeprefix('step_'))}" in done.stdout


def test_several_hosts_are_for_the_script_that_reaches_them():
    launcher, others = split_launcher(["-H", "hosts", "--num_gpus", "8", "mine.yaml", "--max_restarts=2"])
    assert others == ["mine.yaml"]
    assert console._as_environment([one for one in launcher if "restarts" not in one]) == {"HOSTFILE": "hosts", "NUM_GPUS": "8"}
    with pytest.raises(ValueError, match="--include does not go together with several hosts. They take --hostfile, --num_gpus"):
        console._as_environment(["--hostfile=hosts", "--include=localhost:1"])
    with pytest.raises(ValueError, match="several hosts are named by --hostfile FILE"):
        console._as_environment(["--node_rank=1"])
