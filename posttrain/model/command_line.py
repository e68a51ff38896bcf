"""Command-line options of the scripts that load finished checkpoints: serve.py, eval_benchmarks.py and eval_preferences.py."""

import argparse
import re
from pathlib import Path

from posttrain.common.options import named_place, place
from posttrain.model.forms import HOW, find_model, name_of, newest, tokenizer_beside


def add_checkpoint_options(parser: argparse.ArgumentParser, checkpoint_help: str | None = None) -> None:
    """Add --checkpoint, --tokenizer and --dtype."""
    parser.add_argument("--checkpoint", action="append", required=True, type=named_place, metavar="[NAME=]DIR", help=checkpoint_help)
    parser.add_argument(
        "--tokenizer", type=place, metavar="T", help="for checkpoints without one beside them: a folder or a SentencePiece .model file"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: float32 on a CPU, else the checkpoint's own")


def parse(parser: argparse.ArgumentParser, **least: float) -> argparse.Namespace:
    """Return the command's options.

    `least` has the least value of numeric options by name. Raises ValueError for one below it.
    """
    options = parser.parse_args()
    for name, bound in least.items():
        if (value := getattr(options, name)) is not None and value < bound:
            raise ValueError(f"--{name} must be at least {bound}, not {value}")
    return options


def places_by_name(given: list[str], tokenizer: str | None) -> dict[str, str]:
    """Return the place of each checkpoint, given as [NAME=]DIR, by its name.

    Raises ValueError where two have the same name, and for a --tokenizer that no checkpoint needs.
    """
    pairs = []
    for one in given:
        found = re.fullmatch(r"([\w.@-]+)=(.+)", one)
        pairs.append((found[1], found[2]) if found and not Path(one).exists() else (name_of(one), one))
    if len(dict(pairs)) < len(pairs):
        names = ", ".join(name for name, _ in pairs)
        raise ValueError(f"two checkpoints have the same name ({names}); give each its own: --checkpoint NAME=DIR")
    if tokenizer and all(tokenizer_beside(newest(place)) for _, place in pairs):
        raise ValueError("--tokenizer would not be read: every checkpoint has its own beside it; leave it out")
    return dict(pairs)


def refuse_missing(options: argparse.Namespace, *more: str) -> None:
    """Raise FileNotFoundError or ValueError where a checkpoint of a command line is not there; `more` are given as --checkpoint is."""
    for one in places_by_name([*options.checkpoint, *more], options.tokenizer).values():
        find_model(newest(one), HOW)
