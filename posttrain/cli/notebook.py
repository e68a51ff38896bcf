"""The commands as Python functions, for notebooks and scripts: `from posttrain import prepare, sft, dpo`.

Each command runs in processes of its own, so a notebook needs no GPU memory, no process group and no signal handlers for it, and may have
an event loop. Only the standard library is imported before a function is called.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from posttrain.common.places import CONSOLE, PACKAGE, PARENT

KEPT = 200  # lines of output in which the message of a failure is looked for
SHOWN = 20  # lines of it that an error shows where there is no message


@dataclass(frozen=True)
class FinishedRun:
    """A run that has come to its end."""

    out_dir: Path

    @property
    def final(self) -> Path:
        """The trained model, a Hugging Face folder with its tokenizer."""
        return self.out_dir / "final"

    @property
    def metrics(self) -> list[dict]:
        """The metrics of every step ("split": "train") and every validation ("split": "eval"), as RUN/metrics.jsonl holds them."""
        from posttrain.run.stored import read_log

        return read_log(self.out_dir, "metrics.jsonl")


def prepare(kind: str, *, tokenizer: str | Path, output_dir: str | Path, **options: object) -> Path:
    """Prepare rows for training and return the folder with them.

    `kind` is "sft" or "dpo"; `options` are those of data_prep/prepare_sft.py, for example dataset="my_rows.jsonl" or, for several,
    dataset=["alpaca:0.5", "my_rows.jsonl"]. Raises RuntimeError, with the command's message, where the rows cannot be prepared.
    """
    if kind not in ("sft", "dpo"):
        raise ValueError(f"kind should be 'sft' or 'dpo', saw {kind!r}")
    words = [f"prepare-{kind}"]
    for name, value in {"tokenizer": tokenizer, "output_dir": output_dir, **options}.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words.append(f"--{name}={one}")
    _run(words)
    return Path(output_dir).expanduser()


def sft(recipe: str | Path | None = None, *, num_gpus: int = 1, **keys: object) -> FinishedRun:
    """Train by supervised fine-tuning, and return the run; an unfinished run in its out_dir is resumed.

    `recipe` is a YAML file and `keys` are the recipe's, which win: sft(checkpoint_path="meta-llama/Llama-3.2-1B", sft_data_dir=data,
    out_dir="runs/mine", num_gpus=2). Raises ValueError for a mistake in them, and RuntimeError, with the run's message, where the run
    fails or stops before its last step. An interrupt, or the end of this process, is passed on: the run saves and stops, and the same
    call resumes it.
    """
    return _train("sft", recipe, num_gpus, keys)


def dpo(recipe: str | Path | None = None, *, num_gpus: int = 1, **keys: object) -> FinishedRun:
    """Train by Direct Preference Optimization, and return the run, as `sft` does."""
    return _train("dpo", recipe, num_gpus, keys)


def _train(kind: str, recipe: str | Path | None, num_gpus: int, keys: dict[str, object]) -> FinishedRun:
    from posttrain.model.forms import newest
    from posttrain.recipes.reading import load_recipe_of

    words = [str(recipe)] if recipe is not None else []
    words += [f"--{name}={value}" for name, value in keys.items()]
    asked = load_recipe_of(kind, words)
    _run([kind, *([f"--num_gpus={num_gpus}"] if num_gpus > 1 else []), *words])
    out_dir = Path(asked.out_dir)
    run = FinishedRun(out_dir)
    if not asked.only_looks and newest(str(out_dir)) != str(run.final):
        raise RuntimeError(
            f"posttrain {kind} saved and stopped before its last step, by a signal or its time_limit: {run.final} is not there, or of a "
            "shorter run. The same call resumes it"
        )
    return run


def _run(words: list[str]) -> None:
    """Run a command of `posttrain` to its end and print what it prints. Raises RuntimeError, with its message, where it fails."""
    environment = os.environ | {CONSOLE: "1", PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(PACKAGE / "cli" / "console.py"), *words]
    lines: deque[str] = deque(maxlen=KEPT)
    interrupted = False
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # an interrupt of a terminal or a notebook reaches it once, from here
    ) as process:
        while process.poll() is None:
            try:
                for line in process.stdout or ():
                    lines.append(line)
                    sys.stdout.write(line)
                    sys.stdout.flush()
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    if process.returncode:
        raise RuntimeError(f"posttrain {words[0]} failed (exit code {process.returncode}): {_message(lines)}")


def _message(lines: Iterable[str]) -> str:
    """Return a command's error message: from its last line that begins with `error:` on; else the last lines of its output."""
    every = [line.rstrip("\n") for line in lines]
    begins = [number for number, line in enumerate(every) if line.startswith("error: ")]
    if not begins:
        return "\n".join(every[-SHOWN:])
    said = every[begins[-1] :]
    ours = next((number for number, line in enumerate(said) if line.startswith("[") and "launch.py" in line), len(said))
    return "\n".join(said[:ours]).removeprefix("error: ")
