"""The command `posttrain`: finds the script of a command, and starts it in place of this process, or DeepSpeed's launcher with it."""

import argparse
import contextlib
import io
import os
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the folder with posttrain in it, which need not be installed

from posttrain.common.errors import nearest
from posttrain.common.places import COMMANDS, CONSOLE, ON_RANKS, shipped
from posttrain.parallel.script import run_script

# options of DeepSpeed's launcher, which it takes before the script
WITH_VALUE = ("--num_gpus", "--num_nodes", "--hostfile", "--include", "--exclude", "--master_port", "--master_addr", "--node_rank")
WITH_VALUE += ("--launcher", "--launcher_args", "--ssh_port", "--bind_core_list", "--venv_script", "--max_restarts")
ALONE = ("--no_ssh", "--no_ssh_check", "--force_multi", "--bind_cores_to_rank")
SHORT = {"--hostfile": "-H", "--include": "-i", "--exclude": "-e"}
SEVERAL_HOSTS = ("--num_nodes", "--hostfile", "--no_ssh")


def usage() -> str:
    """Return what `posttrain --help` prints."""
    width = max(map(len, COMMANDS))
    lines = ["posttrain COMMAND ...        each command has --help", "posttrain --version", "", "commands:"]
    lines += [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    lines += ["", f"{', '.join(sorted(ON_RANKS))} run on several GPUs with --num_gpus N. They take more options of DeepSpeed's launcher:"]
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
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *(one for one in launcher if one not in restarts)]
    _become(str(shipped("launch/supervise.py")), *restarts, *deepspeed, script, *others)


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
