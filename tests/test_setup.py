"""Set-up (launch/env.sh, launch/set_up.py): mistakes are refused before anything is written; what fails or is stopped can be repeated.

The checkouts are copies, in a folder with spaces, whose package needs only what a folder of tiny wheels offers, and uv, so that nothing is
downloaded.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from posttrain.engine import cpu_adam
from posttrain.recipes.keys import SFTRecipe
from posttrain.training.build import read_inputs

# builds the copies' package: an editable install is a file that names the folder
BACKEND = """
import zipfile

def build_editable(folder, *_):
    info = "posttrain-1.dist-info"
    with zipfile.ZipFile(f"{folder}/posttrain-1-py3-none-any.whl", "w") as wheel:
        needs = "Requires-Dist: torch\\nProvides-Extra: gpu\\nProvides-Extra: dev\\nRequires-Dist: tests_need; extra == 'dev'\\n"
        needs += "Provides-Extra: fa4\\nRequires-Dist: flash-attn-4==4.0.0b18; extra == 'fa4'\\n"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: posttrain\\nVersion: 1\\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("posttrain.pth", PLACE + "\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return "posttrain-1-py3-none-any.whl"
"""
ISOLATED = ("PIP_", "UV_", "PYTHON", "POSTTRAIN_", "VIRTUAL_ENV")


def checkout(folder: Path) -> Path:
    """A copy of what set-up reads, in a folder with spaces and letters beyond ASCII."""
    place = folder / "ein Ordner für mich"
    shutil.copytree(ROOT / "launch", place / "launch", ignore=shutil.ignore_patterns("base", "__pycache__"))
    (place / "posttrain").mkdir()
    (place / "posttrain" / "__init__.py").write_text('__version__ = "1"\n')
    (place / "constraints.txt").write_text("tests_need==1\n")
    (place / "setup.py").write_text('setup(extras_require={"gpu": [], "fa4": ["flash-attn-4"], "dev": ["tests_need"]})\n')
    (place / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    (place / "backend.py").write_text(f"PLACE = {str(place)!r}\n{BACKEND}")
    script = place / "launch" / "set_up.py"
    script.write_text(re.sub(r'IMPORTS = """.*?"""', 'IMPORTS = "torch posttrain"', script.read_text(), flags=re.S))
    return place


def wheel(folder: Path, name: str, version: str, needs: str = "", program: str = "") -> None:
    info, folder = f"{name}-{version}.dist-info", folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"import types\nversion = types.SimpleNamespace(cuda={'13.0' if 'nvidia' in needs else None!r})\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        if program:
            file.write(program, f"{name}-{version}.data/scripts/{name}")
        file.writestr(f"{info}/RECORD", "")
    links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in folder.glob("*.whl"))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> dict[str, str]:
    """Settings of pip, in a file: an index with torch's CUDA build, and a folder with the CPU build, which pip prefers."""
    folder = tmp_path_factory.mktemp("index")
    wheel(folder / "simple", "torch", "2.0", "Requires-Dist: nvidia-cublas\n")
    wheel(folder / "simple", "nvidia_cublas", "1")
    os.rename(folder / "simple" / "nvidia_cublas", folder / "simple" / "nvidia-cublas")
    wheel(folder / "simple", "tests_need", "1")
    os.rename(folder / "simple" / "tests_need", folder / "simple" / "tests-need")
    wheel(folder / "more", "flash_attn_4", "4.0.0b18")
    os.rename(folder / "more" / "flash_attn_4", folder / "more" / "flash-attn-4")
    wheel(folder / "more", "tests_need", "0.9")  # uv by itself would look no further than the first index with the package
    os.rename(folder / "more" / "tests_need", folder / "more" / "tests-need")
    wheel(folder / "links", "torch", "2.0+cpu")
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        pytest.skip("there is no uv beside Python: set-up took pip here")
    wheel(folder / "simple", "uv", "1", program=str(uv))
    indexes = f"[global]\nindex-url = {(folder / 'simple').as_uri()}\nextra-index-url = {(folder / 'more').as_uri()}\n"
    (folder / "pip.conf").write_text(f"{indexes}[install]\nfind-links = {folder / 'links' / 'torch'}\n")
    return {"PIP_CONFIG_FILE": str(folder / "pip.conf"), "UV_CACHE_DIR": str(folder / "cache")}


def source(place: Path, shell: str = "bash", then: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Source env.sh from another folder, and say what became of it; output and errors come together."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ISOLATED)}
    command = f'source "{place}/launch/env.sh"; echo "returned $?"; {then}'
    how = {"env": clean | environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([shell, "-c", command], cwd=place.parent, **how)


def stamp(place: Path) -> dict:
    return json.loads((place / ".venv" / "complete").read_text())


def script(folder: Path, name: str, text: str) -> str:
    """Make a program of a shell's text; returns its path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


def is_untouched(place: Path) -> bool:
    return not (place / ".venv").exists() and not list(place.parent.glob("*.lock")) + list(place.parent.glob(".*"))


REFUSED = {
    "another system": "env.sh: DeepSpeed and this project run on Linux, and this is Darwin: use a Linux machine or, on Windows, WSL",
    "no such Python": "env.sh: Python 3.11 or newer is needed; there is no python4; install one, or name one with PYTHON=python3.12",
    "an old Python": "is 3.10; install one, or name one with PYTHON=python3.12",
    "no venv module": "lacks its venv module (Debian: python3.",
    "a misspelt extra": "env.sh: POSTTRAIN_EXTRAS names dav; setup.py has the extras gpu, fa4, dev",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_set_up_is_refused_before_anything_is_written(tmp_path, mistake):
    place, tools = checkout(tmp_path), tmp_path / "tools"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ensurepip.py").write_text("raise ImportError")
    how = {
        "another system": {"PATH": f"{Path(script(tools, 'uname', 'echo Darwin')).parent}:{os.environ['PATH']}"},
        "no such Python": {"PYTHON": "python4"},
        "an old Python": {"PYTHON": script(tools, "python_old", "echo 3.10")},
        "no venv module": {"PYTHONPATH": str(tmp_path / "broken"), "PYTHON": sys.executable},
        "a misspelt extra": {"POSTTRAIN_EXTRAS": "dav", "PYTHON": sys.executable},
    }[mistake]
    done = source(place, **{"CDPATH": "/usr"} | how)
    assert REFUSED[mistake] in done.stdout
    assert "Traceback" not in done.stdout
    assert "returned 1" in done.stdout
    assert is_untouched(place)


@pytest.mark.parametrize("command", ["sh {}", "bash {}", "sh -c '. {}'"])
def test_env_sh_that_is_not_sourced_by_a_shell_that_it_knows_writes_nothing(tmp_path, command):
    place = checkout(tmp_path)
    quoted = str(place / "launch" / "env.sh").replace(" ", r"\ ") if "'" not in command else f'"{place}/launch/env.sh"'
    done = subprocess.run(command.format(quoted), shell=True, capture_output=True, text=True, cwd=tmp_path)
    if os.readlink("/bin/sh") == "bash" and "'" in command:
        pytest.skip("sh is bash here")
    assert "env.sh: type, in bash or zsh: source launch/env.sh" in done.stderr
    assert done.returncode == 1
    assert is_untouched(place)


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*.sh")))
def test_a_launch_script_answers_help_before_set_up(tmp_path, path):
    place = checkout(tmp_path)
    done = subprocess.run(["bash", place / path, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(bash|sbatch.*|source) launch/", done.stdout)
    assert not re.search(r"#!|SBATCH|set -euo", done.stdout)
    assert is_untouched(place)


@pytest.mark.parametrize("path", ["supervise.py", "multinode.py"])
def test_help_of_a_launch_script_in_python_needs_no_package(path):
    done = subprocess.run([sys.executable, "-IS", ROOT / "launch" / path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python launch/{path}" in done.stdout


@pytest.mark.slow
def test_two_terminals_set_up_one_checkout_by_uv_with_pips_settings(tmp_path, index):
    """The torch is pip's: the best of all indexes, in the index that only pip's configuration names."""
    place = checkout(tmp_path)
    words = ["bash", "-c", f'source "{place}/launch/env.sh"; echo "returned $?"; command -v uv']
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ISOLATED)} | index | {"PYTHON": sys.executable}
    both = [subprocess.Popen(words, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = sorted((process.communicate()[0] for process in both), key=len)
    assert outputs[0] == f"Waiting for another set-up of this checkout ...\nreturned 0\n{place}/.venv/bin/uv\n", outputs
    assert "  1 package, torch 2.0+cpu (CPU build): about 0.5 GB to download, 1.7 GB on disk" in outputs[1]
    assert "pip" not in outputs[1]
    assert stamp(place) | {"inputs": ""} == {
        "inputs": "",
        "root": str(place),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "extras": [],
        "torch": "CPU",
        "versions": {"torch": "2.0"},
    }
    log = (place / ".venv" / "setup.log").read_text()

    shell = shutil.which("zsh") or "bash"
    again = source(place, shell, 'python -c "import posttrain; print(posttrain.__file__)"', **index)
    assert again.stdout == f"returned 0\n{place}/posttrain/__init__.py\n"  # nothing is done twice
    tests = source(place, shell, 'python -c "import tests_need"', **index, POSTTRAIN_EXTRAS="dev")
    assert "installing 1 package" in tests.stdout
    assert tests.returncode == 0
    assert source(place, **index).stdout == "returned 0\n"  # what is there besides does no harm
    assert (stamp(place)["extras"], "Installed 1 package" in log) == (["dev"], False)

    tools = Path(script(tmp_path / "tools", "nvidia-smi", "")).parent  # set up on a login node, used on another
    gpu = source(place, **index, PATH=f"{tools}:{os.environ['PATH']}")
    assert f"warning  this machine has a GPU, and {place}/.venv holds torch's CPU build" in gpu.stdout
    assert gpu.stdout.endswith("returned 0\n")

    wheel(tmp_path, "torch", "2.1+cpu")  # as another package does that pins it
    own = [place / ".venv" / "bin" / "python", "-m", "pip", "install", "-q", tmp_path / "torch" / "torch-2.1+cpu-py3-none-any.whl"]
    subprocess.run(own, check=True, env=clean)
    changed = source(place, **index)
    assert changed.stdout.startswith(f"warning  {place}/.venv has changed since it was set up (torch 2.0 -> 2.1): delete it")
    assert changed.stdout.endswith("returned 0\n")

    (place / ".venv" / "bin" / "python").unlink()  # as if the Python that it was made with had been removed
    (place / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    assert subprocess.run([sys.executable, "-I", place / "launch" / "set_up.py", "--check"]).returncode == 1

    moved = place.rename(tmp_path / "moved")  # its scripts name the old place
    (moved / "backend.py").write_text((moved / "backend.py").read_text().replace(str(place), str(moved)))
    elsewhere = source(moved, then="command -v uv", **index, PIP_USER="1")
    assert f"Setting up {moved}/.venv" in elsewhere.stdout
    assert "going on with pip" not in elsewhere.stdout
    assert elsewhere.stdout.endswith(f"returned 0\n{moved}/.venv/bin/uv\n")


@pytest.mark.slow
def test_a_gpu_that_can_use_it_gets_flash_attention_4(tmp_path, index):
    """Its package, an extra, is for few GPUs, and lies on few mirrors: set-up does without it."""
    place, tools = checkout(tmp_path), tmp_path / "tools"
    folder = Path(index["PIP_CONFIG_FILE"]).parent
    how = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": (folder / "simple").as_uri(), "UV_CACHE_DIR": index["UV_CACHE_DIR"]}
    how |= {"PATH": f"{tools}:{os.environ['PATH']}"}
    for capability, more, extras, says in (
        ("12.0", "/nowhere", ["gpu"], "(CUDA build)"),
        ("9.0", "/nowhere", ["gpu"], "FlashAttention-4 cannot be had here"),
        ("10.3", str(folder / "more"), ["fa4", "gpu"], "installing FlashAttention-4"),
    ):
        script(tools, "nvidia-smi", f'[ "$1" = --query-gpu=compute_cap ] && printf "8.9\\n{capability}\\n"')
        (place / "constraints.txt").write_text(f"tests_need==1\n# {capability}\n")
        done = source(place, **how, PIP_EXTRA_INDEX_URL=Path(more).as_uri())
        assert says in done.stdout and done.stdout.endswith("returned 0\n"), done.stdout
        assert (stamp(place)["torch"], stamp(place)["extras"]) == ("CUDA", extras)
        assert "FlashAttention-4" not in done.stdout or capability != "12.0"
    there = source(place, then='python -c "import flash_attn_4"', **how)
    assert (there.returncode, there.stdout) == (0, "returned 0\n")


@pytest.mark.slow
def test_set_up_goes_on_after_it_failed_or_was_killed(tmp_path, index):
    place = checkout(tmp_path)
    closed = source(place, **{"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0"})
    assert "uv cannot be had: going on with pip" in closed.stdout
    assert "env.sh: the packages could not be installed: see that the index can be reached (PIP_INDEX_URL names another)" in closed.stdout
    assert closed.stdout.endswith("returned 1\n")
    log = place / ".venv" / "setup.log"
    assert "127.0.0.1" in log.read_text()

    clean = {name: value for name, value in os.environ.items() if not name.startswith(ISOLATED)} | index
    process = subprocess.Popen([sys.executable, "-I", place / "launch" / "set_up.py"], env=clean, stdout=subprocess.PIPE, text=True)
    while not (place / ".venv" / "bin").exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (place / ".venv" / "complete").exists()
    other = source(place, **index, PIP_PREFER_BINARY="1")
    assert "pip's setting prefer-binary has no counterpart in uv: going on with pip" in other.stdout
    assert other.stdout.endswith("returned 0\n"), other.stdout
    assert "127.0.0.1" in log.read_text()  # the failure's log is still there
    assert stamp(place)["torch"] == "CPU"

    installed = sorted(path.name for path in (place / ".venv").glob("lib/python*/site-packages/*"))
    for _ in range(2):  # where there is no network, what is there stays
        offline = source(
            place, **{"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0"}, POSTTRAIN_EXTRAS="dev"
        )
        assert f"Bringing up to date {place}/.venv" in offline.stdout
        assert offline.stdout.endswith("returned 1\n"), offline.stdout
    assert installed == sorted(path.name for path in (place / ".venv").glob("lib/python*/site-packages/*"))
    assert (stamp(place)["extras"], stamp(place)["inputs"]) == (["dev"], "")


@pytest.mark.slow
def test_an_environment_made_by_hand_is_not_deleted(tmp_path, index):
    place = checkout(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / ".venv"], check=True)
    done = source(place, **index)
    assert f"{place}/.venv is none that set-up made, and has no Python 3.11 or newer with pip: move it away" in done.stdout
    assert (place / ".venv" / "bin" / "python").exists()


def test_offload_without_a_compiler_is_refused_before_ranks_meet(tmp_path, tiny, monkeypatch):
    """Nothing is compiled for a run that does not offload."""
    recipe = SFTRecipe(checkpoint_path=str(tiny.base), sft_data_dir=str(tiny.sft), out_dir=str(tmp_path / "run"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu_adam.CPUAdamBuilder, "_loaded_ops", {})
    read_inputs(recipe)
    assert not (tmp_path / "compiled").exists()
    with pytest.raises(ValueError, match=r"has no no-such-compiler; install it \(Debian: g\+\+\), or take a ds_config without offload"):
        read_inputs(recipe.model_copy(update={"ds_config": "ds_configs/zero3_offload.json"}))
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "a file"))
    with pytest.raises(ValueError, match="set TORCH_EXTENSIONS_DIR to a folder that can be written to"):
        read_inputs(recipe.model_copy(update={"ds_config": "ds_configs/zero3_offload.json"}))


def test_compiled_code_is_kept_apart_by_versions_and_kind_of_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    here = cpu_adam.ops_folder()
    assert here.parent == tmp_path
    monkeypatch.setattr(cpu_adam, "_cpu", lambda: "another")
    assert cpu_adam.ops_folder() != here
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert cpu_adam.ops_folder().is_relative_to(sys.prefix)  # not the user's, which all environments share
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cpu_adam.ops_folder().is_relative_to(tmp_path / "cache" / "posttrain")


def test_everything_that_set_up_installs_is_pinned():
    pins, seen = pinned(), {}
    pending = [Requirement(f"posttrain[{','.join(extras())}]")]
    while pending:
        wanted = pending.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if wanted.extras <= seen.get(name, set()) and name in seen:
            continue
        seen[name] = seen.get(name, set()) | wanted.extras
        try:
            installed = distribution(name)
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        if name not in ("posttrain", "setuptools"):
            assert pins.get(name) == installed.version.partition("+")[0], f"{name} {installed.version}"
        for line in installed.requires or []:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *seen[name])):
                pending.append(need)
    assert {"torch", "deepspeed", "ruff", "trl"} <= set(seen)


def pinned() -> dict[str, str]:
    """The versions of constraints.txt by package."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def extras() -> list[str]:
    """Names of the extras of setup.py."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    return [key.value for node in calls if node.arg == "extras_require" for key in node.value.keys]


def test_the_dockerfile_is_clean_and_finds_what_it_copies():
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    text = (ROOT / "Dockerfile").read_text()
    for file in re.findall(r"^COPY (?!--from)(\S+)", text, re.M):
        assert (ROOT / file).exists(), file
    for extra in re.search(r"^ARG EXTRAS=(\S+)$", text, re.M)[1].split(","):
        assert extra in extras()
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in ("setup.py", "pyproject.toml", "posttrain", "data_prep", "ds_configs", "launch", "constraints.txt", "README.md"):
        assert needed not in ignored
