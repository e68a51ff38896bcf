"""Where this package's own files are, and how its commands are called: in a checkout, and installed by pip.

It imports the standard library only, and runs on any Python 3: the commands import it first.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from posttrain.common.errors import nearest

PACKAGE = Path(__file__).resolve().parents[1]
CONSOLE = "POSTTRAIN_CONSOLE"  # set in the environment where the command `posttrain` was used: messages then name commands in its form
PARENT = "POSTTRAIN_PARENT"  # the process id of the Python program that called a command as a function, with which the command ends

# the commands of `posttrain`: the script that each runs, and what it does
COMMANDS = {
    "prepare-sft": ("data_prep/prepare_sft.py", "prepare conversations or documents for SFT"),
    "prepare-dpo": ("data_prep/prepare_dpo.py", "prepare preference pairs for DPO"),
    "preview": ("data_prep/preview.py", "show prepared rows as the model sees them"),
    "plan": ("posttrain/plan.py", "estimate memory and time of a run before it starts"),
    "doctor": ("launch/doctor/doctor.py", "examine this machine, or all hosts of a hostfile, before a run"),
    "sft": ("posttrain/sft.py", "supervised fine-tuning of a base model on conversations"),
    "dpo": ("posttrain/dpo.py", "Direct Preference Optimization of an SFT model"),
    "serve": ("posttrain/serve.py", "chat page and OpenAI-compatible server for checkpoints"),
    "eval": ("posttrain/eval_benchmarks.py", "measure checkpoints on benchmarks"),
    "eval-preferences": ("posttrain/eval_preferences.py", "measure preferences between checkpoints or answers"),
    "convert": ("posttrain/convert.py", "convert a model between Hugging Face folder, ckpt.pt and a run's checkpoint"),
    "report": ("posttrain/report.py", "one page with curves and answers of runs"),
}
ON_RANKS = {"sft", "dpo", "eval"}  # commands that DeepSpeed's launcher can start on several GPUs


def shipped(name: str) -> Path:
    """Return where a file or folder of the repository is, named from its root: a wheel has ds_configs/ and launch/ inside posttrain/."""
    inside = PACKAGE / name
    return inside if inside.exists() else PACKAGE.parent / name


def is_checkout() -> bool:
    """Whether this code runs in a checkout of the repository, where commands are scripts; in a wheel ds_configs/ lies in posttrain/."""
    return not (PACKAGE / "ds_configs").is_dir()


def uses_console() -> bool:
    """Whether messages should name commands as `posttrain COMMAND`."""
    return CONSOLE in os.environ or not is_checkout()


def command(name: str, *words: object, ranks: int = 1, several_hosts: bool = False) -> str:
    """Return a command line to show to the user, in the form in which this process was started.

    `name` is one of COMMANDS and `words` its arguments; with `ranks` above 1 it starts so many processes on this machine, and with
    `several_hosts` (sft or dpo) those of the hosts of a hostfile.
    """
    shown = [shlex.quote(str(word)) for word in words]
    if several_hosts:
        start = f"posttrain {name} --hostfile HOSTFILE" if uses_console() else f"HOSTFILE=launch/hostfile bash launch/{name}_multinode.sh"
        return " ".join([start, *shown])
    if uses_console():
        return " ".join(["posttrain", name, *([f"--num_gpus {ranks}"] if ranks > 1 else []), *shown])
    script = COMMANDS[name][0]
    if Path.cwd() != PACKAGE.parent:
        script = shlex.quote(str(PACKAGE.parent / script))
    return " ".join([f"deepspeed --num_gpus {ranks}" if ranks > 1 else "python", script, *shown])


def missing_package(error: ModuleNotFoundError) -> str:
    """Return what to do about a package that is not there, as three lines."""
    package = (error.name or str(error)).partition(".")[0]
    who = f"this Python, {sys.executable}, lacks the package {package}"
    if is_checkout():
        env = shlex.quote(str(PACKAGE.parent / "launch" / "env.sh"))
        return f"error: {who}. The environment of this checkout is not active; in bash:\n    source {env}\nand give the command again"
    return (
        f"error: {who}. Install posttrain's wheel together with what it needs (without --no-deps):\n"
        f"    {shlex.quote(sys.executable)} -m pip install posttrain-*.whl\nand give the command again"
    )


def in_this_form(text: str) -> str:
    """Return a text with the scripts' command lines in it as the user calls them: unchanged, or as `posttrain COMMAND`."""
    if uses_console():
        for name, (script, _) in COMMANDS.items():
            text = re.sub(rf"deepspeed (--num_gpus \S+) {re.escape(script)}", rf"posttrain {name} \1", text)
            text = re.sub(rf"(python )?(?<![\w/]){re.escape(script)}", f"posttrain {name}", text)
    return text


def expanded(path: str) -> str:
    """Return a path with `~` and `~user` at its beginning replaced by the home directory, which a shell does not do after `=`, nor YAML.

    Raises ValueError for a user who has none, for a zero byte, and for a path whose bytes are not UTF-8, which libraries cannot open.
    """
    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise ValueError(f"the home directory of {home.partition('/')[0]} is not known; write the whole path, or ./~ for a folder named ~")
    if "\0" in home:
        raise ValueError("it holds a zero byte, which no path has")
    try:
        home.encode()
    except UnicodeEncodeError:
        shown = home.encode(errors="backslashreplace").decode()  # pydantic takes no message with such bytes
        raise ValueError(f"{shown} has bytes that are not UTF-8, which libraries cannot open: rename it, or name it from within") from None
    return home


def find_ds_config(path: str) -> Path:
    """Return where a ds_config is: a file of the user's own, else the shipped one of that name. Raises FileNotFoundError."""
    own, ours = Path(path), shipped(path)
    if own.is_file() or ours.is_file():
        return own if own.is_file() else ours
    names = sorted(one.name for one in shipped("ds_configs").glob("*.json"))
    hint = nearest(path, [f"ds_configs/{name}" for name in names])
    raise FileNotFoundError(f"there is no ds_config at {path}.{hint} Shipped in ds_configs: {', '.join(names)}")
