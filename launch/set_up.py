"""Makes .venv and installs what runs need; launch/env.sh calls it, and it needs nothing but Python 3.11.

set_up.py            makes .venv, or brings it up to date
set_up.py --check    exit code 0 if nothing is to be done

Environment: PYTHON, the interpreter that .venv is to have; POSTTRAIN_EXTRAS, extras of setup.py that are wanted besides; and pip's own
settings, which uv gets as well.
"""

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON, LOG, STAMP = VENV / "bin" / "python", VENV / "setup.log", VENV / "complete"
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = (CONSTRAINTS, ROOT / "setup.py", ROOT / "posttrain" / "__init__.py")  # a change of these makes .venv out of date
CPU_INDEX = "export PIP_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_EXTRA_INDEX_URL=https://pypi.org/simple"
SIZES = {"CPU": (0.5, 1.7), "CUDA": (3.0, 5.7)}  # gigabytes to download, and on disk, with torch's build for it (measured for 2.13)
SHOWN = 15  # last lines of the log that are shown after a failure
# What runs import: it fails here rather than in the first run, and is kept as bytecode, which saves every process 7 s
IMPORTS = """torch.utils.tensorboard torch._dynamo deepspeed.runtime.zero.stage3 deepspeed.runtime.zero.stage_1_and_2 deepspeed.ops.adam
deepspeed.launcher.runner transformers.models.qwen3.modeling_qwen3 transformers.models.llama.modeling_llama datasets datasketch lm_eval
matplotlib.pyplot pydantic rich.live starlette uvicorn scipy.stats sentencepiece posttrain"""
# pip's settings as uv's options, each given once for every word of the value, and as its environment variables
OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
    "no-binary": "--no-binary",
    "only-binary": "--only-binary",
}
SWITCHES = {"no-index": "--no-index", "pre": "--prerelease=allow", "no-cache-dir": "--no-cache"}
VARIABLES = {
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("HTTP_PROXY", "HTTPS_PROXY"),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
}
# settings of pip that change nothing of what is installed here
INDIFFERENT = {
    *("disable-pip-version-check", "no-color", "no-input", "no-python-version-warning", "progress-bar", "quiet", "verbose", "log"),
    *("cache-dir", "retries", "require-virtualenv", "use-feature", "root-user-action", "no-warn-script-location", "keyring-provider"),
    *("user", "break-system-packages", "exists-action", "no-compile", "compile", "config-file"),
}


class SetUpError(Exception):
    """Set-up cannot go on; the message is for the user."""


class WithoutUv(Exception):
    """uv cannot install here, for the reason of the message; pip may."""


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        return 0 if is_ready() else 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with only_one() as lock:
            if not is_ready():
                set_up(lock)
    except SetUpError as error:
        print(f"env.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nenv.sh: stopped; source launch/env.sh again to go on", file=sys.stderr)
        return 130
    return 0


def is_ready() -> bool:
    """Whether .venv was completed here from what constraints.txt and setup.py now say, with all extras that are wanted."""
    stamp = read_stamp()
    if not is_ours(stamp) or stamp["inputs"] != hash_of_inputs() or not set(wanted_extras()) <= set(stamp["extras"]):
        return False
    before, now = stamp.get("versions", {}), versions()
    if changed := [f"{name} {before[name]} -> {now.get(name, 'none')}" for name in before if now.get(name) != before[name]]:
        print(f"warning  {VENV} has changed since it was set up ({', '.join(changed)}): delete it and source launch/env.sh here")
    if stamp["torch"] == "CPU" and has_gpu():
        print(f"warning  this machine has a GPU, and {VENV} holds torch's CPU build: delete it and source launch/env.sh here")
    return True


def is_ours(stamp: dict) -> bool:
    """Whether .venv was completed at this place, which its scripts name, by a Python that is still there, and that PYTHON names, if set."""
    if stamp.get("root") != str(ROOT) or not PYTHON.exists():
        return False
    if not (named := os.environ.get("PYTHON")):
        return True
    return version_of(named) == stamp["python"]


def read_stamp() -> dict:
    """What was installed when .venv was completed; empty before."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:  # version 0.1.0 wrote a checksum and installed everything
        return {"inputs": "", "root": str(ROOT), "python": version_of(PYTHON), "extras": ["dev"], "torch": torch_build()}


def versions() -> dict[str, str]:
    """The versions in .venv of what decides a run's numbers, by the names of their folders; without torch's build."""
    names = (path.stem for path in VENV.glob("lib/python*/site-packages/*.dist-info"))
    found = (re.fullmatch(r"(torch|transformers|deepspeed)-([^+]+).*", name) for name in names)
    return {match[1]: match[2] for match in found if match}


def version_of(python: str | Path) -> str:
    """The version of a Python, such as .venv's, which may be another than the one that runs this; empty where there is none."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def torch_build() -> str:
    """CPU or CUDA, as the torch that is installed says."""
    code = "import torch; print('CUDA' if torch.version.cuda else 'CPU')"
    try:
        return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.strip() or "CPU"
    except OSError:
        return "CPU"


def hash_of_inputs() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def takes_fa4() -> bool:
    """Whether this machine has a GPU of the kinds for which FlashAttention-4 is tried: those of compute capability 9 and 10."""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        return re.search(r"^(9|10)\.", subprocess.run(asked, capture_output=True, text=True).stdout, re.M) is not None
    except OSError:
        return False


def wanted_extras() -> list[str]:
    """The extras of POSTTRAIN_EXTRAS. Raises SetUpError for one that setup.py does not have."""
    wanted = [name for name in re.split(r"[,\s]+", os.environ.get("POSTTRAIN_EXTRAS", "")) if name]
    if wanted:
        calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))) if isinstance(node, ast.keyword)]
        known = [key.value for node in calls if node.arg == "extras_require" for key in node.value.keys]
        if unknown := [name for name in wanted if name not in known]:
            raise SetUpError(f"POSTTRAIN_EXTRAS names {unknown[0]}; setup.py has the extras {', '.join(known)}")
    return wanted


@contextmanager
def only_one():
    """Wait until no other process sets this checkout up. Raises SetUpError where nothing can be written."""
    try:
        lock = (ROOT / ".setup.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise SetUpError(
            f"{ROOT} cannot be written to ({error.strerror}), so there can be no .venv: copy it to a folder of yours, or pip install it "
            "into an environment of yours"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up of this checkout ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a network file system without locks
        yield lock.fileno()


def set_up(lock: int) -> None:
    """Make .venv or bring it up to date, and write the stamp.

    While .venv is brought up to date the stamp says so: if that fails, what is there stays, and the next call tries again.
    """
    started, before = time.monotonic(), read_stamp()
    before = before if is_ours(before) else {}
    extras = sorted({*wanted_extras(), *before.get("extras", [])})
    VENV.mkdir(exist_ok=True)
    if before:
        STAMP.write_text(json.dumps(before | {"inputs": "", "extras": extras}), encoding="utf-8")
    else:
        STAMP.unlink(missing_ok=True)
        clear_what_is_half_made()
    python = version_of(PYTHON) or "{}.{}".format(*sys.version_info)
    print(f"{'Bringing up to date' if before else 'Setting up'} {VENV}, Python {python}. Log: {LOG}", flush=True)
    with LOG.open("a", encoding="utf-8") as log:
        step = Steps(log, lock)
        if not PYTHON.exists():
            # in a process of its own, whose output goes to the log
            step([sys.executable, "-I", "-m", "venv", str(VENV)], "making an empty environment", "the environment could not be made")
        torch, extras = install(step, extras)
        code = f"import importlib; [importlib.import_module(name) for name in {IMPORTS.split()!r}]"
        environment = without(os.environ, "PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
        step([str(PYTHON), "-c", code], "importing everything once", "the packages were installed, and cannot be imported", environment)
    stamp = {"inputs": hash_of_inputs(), "root": str(ROOT), "python": version_of(PYTHON), "extras": extras, "torch": torch}
    stamp["versions"] = versions()
    STAMP.write_text(json.dumps(stamp), encoding="utf-8")
    print(f"Set up in {time.monotonic() - started:.0f} s.")


def clear_what_is_half_made() -> None:
    """Delete what an earlier set-up left unfinished, or made elsewhere, but for its log. An environment made by hand stays, if it will do.

    Raises SetUpError if it will not.
    """
    if LOG.exists() or not any(VENV.iterdir()):
        for path in VENV.iterdir():
            if path != LOG:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    code = "import pip, sys; sys.exit(sys.version_info < (3, 11))"
    try:
        usable = subprocess.run([PYTHON, "-c", code], capture_output=True).returncode == 0
    except OSError:
        usable = False
    if not usable:
        raise SetUpError(f"{VENV} is none that set-up made, and has no Python 3.11 or newer with pip: move it away")


def install(step: "Steps", extras: list[str]) -> tuple[str, list[str]]:
    """Install the package with its extras; returns torch's build, CPU or CUDA, and the extras.

    uv takes a tenth of pip's time; pip is what everybody has set up, so it decides where uv would do otherwise or fails.
    """
    failed = "the packages could not be installed: see that the index can be reached (PIP_INDEX_URL names another)"
    try:
        command, environment, installed = by_uv(step, pip_settings(), extras)
    except WithoutUv as reason:
        sizes = "; ".join(f"{download} GB to download, {disk} GB on disk for {kind}" for kind, (download, disk) in SIZES.items())
        print(f"  {reason}: going on with pip, which takes some minutes longer (torch's build decides: {sizes})", flush=True)
        command, environment, installed = [*pip_install(), "-e"], None, extras
        step([*command, named(extras)], "installing", failed)
    kind = torch_build()  # of what is installed, which what was planned need not tell
    extras = with_gpu(extras, kind)
    if extras != installed:
        step([*command, named(extras)], "installing kernels for GPUs", failed, environment)
    if kind == "CUDA" and "fa4" not in extras and takes_fa4():
        if step.fails([*command, named([*extras, "fa4"])], "installing FlashAttention-4 (0.1 GB), which this GPU can use", environment):
            print(f"  FlashAttention-4 cannot be had here, runs will take torch's own kernel; {LOG} says more", flush=True)
        else:
            extras = sorted([*extras, "fa4"])
    return kind, extras


def by_uv(step: "Steps", settings: dict[str, str], extras: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Install by uv, saying before what will be downloaded; returns the command, its environment, and the extras that it installed.

    Raises WithoutUv where uv cannot be had, or cannot do it.
    """
    foreign = sorted(settings.keys() - OPTIONS.keys() - SWITCHES.keys() - VARIABLES.keys() - INDIFFERENT)
    if foreign:
        raise WithoutUv(f"pip's setting {foreign[0]} has no counterpart in uv")
    program = VENV / "bin" / "uv"
    if not is_pinned(program) and step.fails([*pip_install(), "--quiet", "--retries=1", "uv"], "fetching the installer, uv (25 MB)"):
        raise WithoutUv("uv cannot be had")
    options, environment = for_uv(settings)
    command, kind = [str(program), "pip", "install", *options, "-e"], None
    print("  looking up what is needed", flush=True)
    # twice where torch turns out to be the build for CUDA: then there are kernels to install with it
    for wanted in (extras, with_gpu(extras, "CUDA")):
        planned = subprocess.run([*command, named(wanted), "--dry-run"], env=environment, capture_output=True, text=True)
        step.log.write(planned.stdout + planned.stderr)
        if planned.returncode:
            raise WithoutUv("uv finds no packages that go together")
        packages = dict(re.findall(r"^ \+ (\S+)==(\S+)", planned.stderr, re.M))
        if "torch" in packages:
            kind = "CUDA" if any(name.startswith("nvidia-") for name in packages) else torch_build()
        if wanted == with_gpu(extras, kind):
            break
    announce(packages, kind)
    if step.fails([*command, named(wanted)], f"installing {counted(packages)}", environment):
        raise WithoutUv("uv fails")
    return command, environment, wanted


def is_pinned(program: Path) -> bool:
    """Whether uv is there in the version of constraints.txt."""
    pin = re.search(r"^uv==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.M)
    return program.exists() and (
        pin is None or pin[1] in subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split()
    )


def pip_install() -> list[str]:
    return [str(PYTHON), "-m", "pip", "install", "-c", str(CONSTRAINTS)]


def named(extras: list[str]) -> str:
    return f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)


def with_gpu(extras: list[str], kind: str) -> list[str]:
    """The extras, and `gpu` with torch's build for CUDA, although this may be a login node without a GPU."""
    return sorted({*extras, "gpu"}) if kind == "CUDA" else extras


def announce(packages: dict[str, str], kind: str) -> None:
    """Say what will be downloaded. Raises SetUpError if the disk has no room for it."""
    if "torch" not in packages:
        return
    download, disk = SIZES[kind]
    free = shutil.disk_usage(VENV).free / 1e9
    print(
        f"  {counted(packages)}, torch {packages['torch']} ({kind} build): about {download} GB to download, {disk} GB on disk; "
        "a minute or two with a fast connection",
        flush=True,
    )
    if kind == "CUDA" and not has_gpu():
        print(
            "  This machine has no GPU. If no machine that uses this checkout has one, stop here (Ctrl-C) and take torch's CPU build, "
            f"{SIZES['CPU'][0]} GB to download:\n    {CPU_INDEX}\n    source launch/env.sh",
            flush=True,
        )
    if free < disk:
        raise SetUpError(f"{VENV} needs {disk} GB on disk, and {free:.1f} GB are free")


def counted(packages: dict[str, str]) -> str:
    return f"{len(packages)} package{'s' * (len(packages) != 1)}"


def pip_settings() -> dict[str, str]:
    """pip's settings by name, from its configuration files and its environment variables, in pip's order of precedence."""
    done = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found = [re.fullmatch(r"(global|install|:env:)\.([\w-]+)=(.*)", line) for line in done.stdout.splitlines()]
    order = {"global": 0, "install": 1, ":env:": 2}
    rows = sorted((match for match in found if match), key=lambda match: order[match[1]])
    return {match[2].replace("_", "-"): str(ast.literal_eval(match[3])) for match in rows}


def for_uv(settings: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """uv's options and environment that do what pip's settings say."""
    # pip takes the best version of all indexes; by default uv takes the first index that has the package at all
    options = [f"--python={PYTHON}", f"--constraints={CONSTRAINTS}", "--index-strategy=unsafe-best-match", "--color=never"]
    environment = without(os.environ, "PYTHONPATH", "VIRTUAL_ENV", "UV_CONSTRAINT") | {"UV_NO_PROGRESS": "1"}
    for name, value in settings.items():
        if name in OPTIONS:
            options += [f"{OPTIONS[name]}={word}" for word in value.split()]
        elif name in SWITCHES and value.lower() not in ("0", "false", "no", "off"):
            options.append(SWITCHES[name])
        for variable in VARIABLES.get(name, ()):
            environment.setdefault(variable, value)
    cache = Path(os.environ.get("UV_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv")
    nearest = next(path for path in (cache, *cache.parents) if path.exists())
    if nearest.stat().st_dev != VENV.stat().st_dev:  # every file would be there twice, often in a home with a quota
        options.append("--no-cache")
        environment["TMPDIR"] = str(VENV)
    return options, environment


def without(environment, *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


class Steps:
    """Runs commands one after another, their output in the log, with a line of progress on the screen.

    They inherit the lock: what outlives this process, if it is killed, still keeps a second set-up waiting.
    """

    def __init__(self, log, lock: int):
        self.log, self.lock = log, lock

    def __call__(self, command: list[str], doing: str, failed: str, environment: dict[str, str] | None = None) -> None:
        """Run a command. Raises SetUpError with the end of the log if it fails."""
        if self.fails(command, doing, environment):
            lines = [
                line[:200]
                for line in LOG.read_text(errors="replace", encoding="utf-8").splitlines()
                if line.strip() and "Retrying" not in line
            ]
            raise SetUpError("\n".join([f"{failed}. The end of {LOG}:", *lines[-SHOWN:]]))

    def fails(self, command: list[str], doing: str, environment: dict[str, str] | None = None) -> bool:
        """Run a command; whether it failed."""
        print(f"\n{time.strftime('%F %T')} {' '.join(command)}", file=self.log, flush=True)
        live, started, shown = sys.stdout.isatty(), time.monotonic(), 0.0
        environment = environment or without(os.environ, "PYTHONPATH") | {"PIP_USER": "0"}  # which some have set, and fails in a .venv
        if not live:
            print(f"  {doing}", flush=True)
        how = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log, "pass_fds": [self.lock]}
        process = subprocess.Popen(command, env=environment, **how)
        try:
            while True:
                seconds = time.monotonic() - started
                line = f"  {doing}: {seconds:.0f} s{written(process.pid) if doing.startswith('install') else ''}"
                if live:
                    print(f"\r{line}", end="", flush=True)
                elif seconds - shown >= 30:
                    shown = seconds
                    print(line, flush=True)
                try:
                    process.wait(0.5)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            if live:
                print(flush=True)
        return process.returncode != 0


def written(process: int) -> str:
    """How much a process has written, as a part of the line of progress; empty below 10 MB."""
    try:
        megabytes = int(re.search(r"^wchar: (\d+)", Path(f"/proc/{process}/io").read_text(encoding="utf-8"), re.M)[1]) / 1e6
    except (OSError, TypeError):
        return ""
    return f", {megabytes:.0f} MB written" if megabytes >= 10 else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
