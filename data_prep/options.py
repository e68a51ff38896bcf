"""The command line of prepare_sft.py and prepare_dpo.py, read before anything is imported that takes long."""

import argparse
import os
import sys
from pathlib import Path

import yaml

from data_prep.catalogue import show
from data_prep.formats.plain import UNITS
from data_prep.shapes.columns import Columns, keep_of, names_of, roles_of
from data_prep.shapes.names import NAMES
from data_prep.sources import Sources, find_sources
from data_prep.workers import cores
from posttrain.common.options import Parser, place
from posttrain.common.places import shipped
from posttrain.data.manifest import TEMPLATES

TOO_LONG = ("drop", "cut", "split_turns")
THINKING = ("keep", "drop", "template")
DUPLICATES = ("drop", "near", "keep")
MANY_DROPPED = 0.1
RECIPES = {
    "sft": ("sft_qwen3_1.8b", "checkpoint_path"),
    "dpo": ("dpo_qwen3_1.8b", "sft_checkpoint_path"),
}  # whose model lends its tokenizer


def parse(kind: str, argv: list[str]) -> argparse.Namespace:
    """The options of a command line, `kind` being sft or dpo. Raises ValueError where one is missing or they contradict each other."""
    parser = Parser(f"prepare-{kind}", f"Prepare data for {kind.upper()}: rows to token ids, once, offline.")
    _add_sources(parser, kind)
    parser.add_argument("--output_dir", type=place, required=True)
    parser.add_argument(
        "--tokenizer",
        type=place,
        help="that of the model to train: its folder or hub name, or a SentencePiece .model; default: the model of the recipe "
        f"{RECIPES[kind][0]}, if it is there",
    )
    parser.add_argument("--template", choices=TEMPLATES, default="chatml", help="chat format: ChatML, or the tokenizer's own template")
    parser.add_argument(
        "--thinking",
        choices=THINKING,
        default="keep",
        help="what is done with the thinking before an answer: train it, drop it, or leave it to the template, of which only those answers "
        "are then trained that it writes as when it is used",
    )
    parser.add_argument("--max_length", type=_count, default=2048, help="longest example in tokens (pairs: prompt and longer answer)")
    parser.add_argument("--too_long", choices=TOO_LONG, default="drop", help="what happens to longer ones; split_turns: SFT only")
    parser.add_argument("--max_samples", type=_count, help="use the first N rows of each source only")
    parser.add_argument("--system_prompt", help="system message for rows that have none")
    parser.add_argument(
        "--val_size", type=_count, help="validation rows; default 1 %%, at most 1000; the upstream's own split if it has one"
    )
    parser.add_argument("--duplicates", choices=DUPLICATES, default="drop", help="drop exact copies, drop near copies too, or keep all")
    parser.add_argument(
        "--decontaminate",
        action="append",
        type=place,
        default=[],
        metavar="FILE",
        help="drop rows that quote a benchmark's rows (a file or folder)",
    )
    _add_columns(parser)
    parser.add_argument("--workers", type=_workers, default=cores(), help="processes that encode; default: as many as there are cores")
    parser.add_argument("--max_dropped", type=_share, default=MANY_DROPPED, help="refuse when a larger share of the rows is unusable")
    parser.add_argument("--revision", help="commit, tag or branch of the hub dataset")
    parser.add_argument("--seed", type=int, default=1337, help="which rows are for validation, and which a weight below 1 leaves out")
    options = parser.parse_args(argv)
    if not options.dataset and not options.source:
        raise ValueError("give --dataset, or --source with a file of your own")
    if options.source and options.dataset and len(options.dataset) > 1:
        raise ValueError("--source stands for one dataset; name files of your own as --dataset FILE to combine several")
    options.tokenizer = options.tokenizer or _model_of_recipe(kind)
    return options


class _List(argparse.Action):
    """Prints the datasets with short names, and exits."""

    def __init__(self, option_strings, dest, kind: str, **options):
        super().__init__(option_strings, dest, nargs=0, **options)
        self.kind = kind

    def __call__(self, parser, *_):
        show(self.kind)
        parser.exit()


def _add_sources(parser: Parser, kind: str) -> None:
    """Add the options that say where rows come from."""
    parser.add_argument(
        "--dataset",
        action="append",
        type=place,
        metavar="NAME[:WEIGHT]",
        help="a dataset of the hub with a short name (--list tells them), or a file, a folder, a pattern in quotes ('data/*.jsonl') or an "
        "address (s3://, hf://, https://) of your own; can be given several times, with weights: 0.5 takes half of its rows, 2 takes each "
        "twice",
    )
    parser.add_argument("--source", type=place, help="a file or folder with the rows of that dataset, instead of the hub")
    parser.add_argument("--list", action=_List, kind=kind, help="tell the datasets that have short names, and exit")
    parser.add_argument("--config", metavar="NAME", help="of a dataset with several, as its card (README.md) names them")
    parser.add_argument("--split", metavar="NAME,...", help="splits to train on; default: train; all for every one")
    parser.add_argument("--txt", choices=UNITS, help="what is a row of a .txt file; default: line")


def _add_columns(parser: Parser) -> None:
    """Add the options that say what columns and messages hold, where they have other names than usual."""
    parser.add_argument(
        "--columns",
        default="",
        metavar="WHAT=NAME,...",
        help=f"what columns hold, as in prompt=question,answer=solution; WHAT is one of {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--ignore", default="", metavar="NAME,...", help="columns, or keys of messages, that are left out, whatever they hold"
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="use only rows with this value, as in label=true, or 'score>=4'; !=, >, < and <= work too, and several --keep at once",
    )
    parser.add_argument("--role_key", metavar="KEY", help="of a message, in the place of role or from")
    parser.add_argument("--content_key", metavar="KEY", help="of a message, in the place of content or value")
    parser.add_argument("--roles", default="", metavar="THEIRS=OURS,...", help="roles of messages, as in human=user,narrator=assistant")
    parser.add_argument("--train_on", default="all", metavar="all|last|ROLE,...", help="which answers of a conversation are trained")


def columns_of(options: argparse.Namespace) -> Columns:
    """Return what the command line says of columns and messages. Raises ValueError."""
    return Columns(
        names=names_of(_parts(options.columns), "--columns"),
        roles=roles_of(_parts(options.roles), "--roles"),
        role_key=options.role_key,
        content_key=options.content_key,
        ignore=tuple(_parts(options.ignore)),
        keep=tuple(map(keep_of, options.keep)),
        train_on=options.train_on,
    )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _model_of_recipe(kind: str) -> str:
    """Return the model from which the shipped recipe of this kind starts, and say so. Raises ValueError where it is not there."""
    name, key = RECIPES[kind]
    model = yaml.safe_load(shipped(f"posttrain/recipes/{name}.yaml").read_text(encoding="utf-8"))[key]
    if not Path(model).is_dir():
        raise ValueError("whose token ids should the data have? Name the model to train: --tokenizer FOLDER_OR_HUB_NAME")
    print(f"--tokenizer is not given: taking that of {model}, the model of the recipe {name}", flush=True)
    return model


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _workers(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is no number of processes")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def look(kind: str, options: argparse.Namespace) -> Sources:
    """Find the sources of a command line. Raises ValueError or OSError where one is not there, or the output is."""
    refuse_output(Path(options.output_dir))
    return find_sources(kind, options).with_columns(columns_of(options))


def refuse_output(output: Path) -> None:
    """Raise FileExistsError if something is at the place of an output: it is not overwritten."""
    if os.path.lexists(output):
        seen = "exists" if output.exists() else "is a link that leads nowhere"
        raise FileExistsError(f"{output} {seen}; remove it or give another --output_dir")


def run(kind: str) -> None:
    """Prepare data as this process's command line asks; an interrupt ends it with one line."""
    options = parse(kind, sys.argv[1:])
    look(kind, options)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from data_prep.prepare import prepare_rows  # only now: it imports torch, transformers and datasets, which takes seconds

        prepare_rows(kind, options)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
