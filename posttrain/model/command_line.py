"""Command-line options of the scripts that load finished checkpoints: serve.py, eval_benchmarks.py and eval_preferences.py."""

import argparse
import re
from pathlib import Path

from posttrain.common.options import named_place, place
from posttrain.model.forms import HOW, find_model, name_of, newest, tokenizer_beside


def add_checkpoint_options(parser: argparse.ArgumentParser, checkpoint_help: str | None = None) -> None:
    """Add --checkpoint, --tokenizer, --dtype and --trust_remote_code."""
    parser.add_argument("--checkpoint", action="append", required=True, type=named_place, metavar="[NAME=]DIR", help=checkpoint_help)
    parser.add_argument(
        "--tokenizer", type=place, metavar="T", help="for checkpoints without one beside them: a folder or a SentencePiece .model file"
    )
    add_code_option(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: float32 on a CPU, else the checkpoint's own")


def add_code_option(parser: argparse.ArgumentParser) -> None:
    """Add --trust_remote_code."""
    what = "run code that comes with a model of a type that transformers does not know: read it first"
    parser.add_argument("--trust_remote_code", action="store_true", help=what)


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


def trusted_places(given: list[str], options: argparse.Namespace) -> dict[str, str]:
    """Return places_by_name's result, and let the code run that comes with these models if --trust_remote_code says so."""
    places = places_by_name(given, options.tokenizer)
    if options.trust_remote_code:
        from posttrain.model.own_code import register  # only now: it imports torch and transformers

        for place in places.values():
            register(newest(place))
    return places


def refuse_missing(options: argparse.Namespace, *more: str) -> None:
    """Raise FileNotFoundError or ValueError where a checkpoint of a command line is not there; `more` are given as --checkpoint is."""
    for one in places_by_name([*options.checkpoint, *more], options.tokenizer).values():
        find_model(newest(one), HOW)
