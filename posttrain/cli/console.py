"""The command `posttrain`: finds the script of a command, and starts it in place of this process, or DeepSpeed's launcher with it."""

import argparse
import contextlib
import ctypes
import io
import os
import signal
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the folder with posttrain in it, which need not be installed

from posttrain.common.errors import nearest
from posttrain.common.places import COMMANDS, CONSOLE, ON_RANKS, PARENT, shipped
from posttrain.parallel.script import run_script

# options of DeepSpeed's launcher, which it takes before the script, and --max_restarts of launch/supervise.py
WITH_VALUE = ("--num_gpus", "--include", "--exclude", "--hostfile", "--node_rank", "--master_addr", "--master_port")
WITH_VALUE += ("--bind_core_list", "--max_restarts")
ALONE = ("--bind_cores_to_rank",)
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
SHORT = {"--hostfile": "-H", "--include": "-i", "--exclude": "-e"}
SEVERAL_HOSTS = ("--hostfile", "--node_rank", "--master_addr")
# those that launch/multinode.py takes, which passes on signals and settings to other hosts, as the environment variables that it reads
ON_HOSTS = {
    "--hostfile": "HOSTFILE",
    "--num_gpus": "NUM_GPUS",
    "--node_rank": "NODE_RANK",
    "--master_addr": "MASTER_ADDR",
    "--master_port": "MASTER_PORT",
}


def usage() -> str:
    """Return what `posttrain --help` prints."""
    width = max(map(len, COMMANDS))
    lines = ["posttrain COMMAND ...        each command has --help", "posttrain --version", "", "commands:"]
    lines += [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    lines += [
        "",
        f"{', '.join(sorted(ON_RANKS))} run on several GPUs with --num_gpus N, on several hosts with --hostfile FILE. All such options:",
    ]
    return "\n".join([*lines, textwrap.fill(" ".join((*WITH_VALUE, *ALONE)), 100, initial_indent="  ", subsequent_indent="  ")])


def split_launcher(words: list[str]) -> tuple[list[str], list[str]]:
    """Split a command's arguments into those for DeepSpeed's launcher, as --name=value or --name, and the others, in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in WITH_VALUE:
        parser.add_argument(name, *filter(None, [SHORT.get(name)]))
    for name in ALONE:
        parser.add_argument(name, action="store_true")
    try:
        found, others = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    given = {f"--{name}": value for name, value in vars(found).items() if value}
    return [name if value is True else f"{name}={value}" for name, value in given.items()], others


def main() -> None:
    """Do what the command `posttrain` was asked for."""
    if parent := os.environ.pop(PARENT, None):
        _end_with(int(parent))
    run_script(lambda: _start(sys.argv[1:]))


def _start(words: list[str]) -> None:
    """Start a command. Raises ValueError for one that is not there, or for a mistake in a recipe that several ranks would all make."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if words[0] in ("-V", "--version", "version"):
        print(sys.modules["posttrain"].__version__)
        return
    name, rest = words[0].replace("_", "-"), words[1:]
    if name not in COMMANDS:
        raise ValueError(f"unknown command {words[0]!r}.{nearest(name, COMMANDS)}\nposttrain --help lists them")
    os.environ[CONSOLE] = "1"
    script = str(shipped(COMMANDS[name][0]))
    launcher, others = split_launcher(rest) if name in ON_RANKS else ([], rest)
    if not launcher or {"-h", "--help"} & set(others):
        _become(script, *others)
    if name != "eval":
        _check_recipe(name, others, any(one.startswith(SEVERAL_HOSTS) for one in launcher))
    restarts = [one for one in launcher if one.startswith("--max_restarts")]
    launcher = [one for one in launcher if one not in restarts] or ["--num_gpus=1"]  # as without restarts
    if any(one.startswith(SEVERAL_HOSTS) for one in launcher):
        os.environ.update(_as_environment(launcher))
        _become(str(shipped("launch/multinode.py")), *restarts, script, *others)
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *launcher]
    _become(str(shipped("launch/supervise.py")), *restarts, *deepspeed, script, *others)


def _end_with(parent: int) -> None:
    """Have the kernel send SIGTERM, at which a run saves and stops, when the process `parent` ends, in whatever way; Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)  # it outlives exec
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


def _as_environment(launcher: list[str]) -> dict[str, str]:
    """Return the options of a run on several hosts as launch/multinode.py takes them. Raises ValueError for one that it does not take."""
    options = {name: value for name, _, value in (one.partition("=") for one in launcher)}
    other = sorted(options.keys() - ON_HOSTS.keys())
    if other or "--hostfile" not in options:
        what = f"{other[0]} does not go together with several hosts" if other else "several hosts are named by --hostfile FILE"
        raise ValueError(f"{what}. They take {', '.join(ON_HOSTS)}; a line of the hostfile reads NAME slots=GPUS")
    return {ON_HOSTS[name]: value for name, value in options.items()}


def _check_recipe(kind: str, words: list[str], several_hosts: bool) -> None:
    """Raise ValueError or FileNotFoundError where a recipe has a mistake, or, on this host alone, names what is not there."""
    from posttrain.recipes.reading import load_recipe_of
    from posttrain.training.missing import refuse_missing

    with contextlib.redirect_stdout(io.StringIO()):  # the first rank will print the notes
        recipe = load_recipe_of(kind, words)
        if not several_hosts:
            refuse_missing(recipe)


def _become(script: str, *words: str) -> NoReturn:
    """Run a Python script in place of this process: signals reach it, and its exit code is this command's."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, script, *words])


if __name__ == "__main__":
    main()
