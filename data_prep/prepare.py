"""From rows to a prepared folder: what prepare_sft.py and prepare_dpo.py share. posttrain/data/prepared.py describes the folder's format.

    sources -> rows -> conversations -> examples (chunks in DIR.incomplete) -> choose (duplicates, validation, weights) -> DIR

The folder is there whole or not at all; after a kill the same command goes on with the chunks that are there, and gives the same bytes.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from data_prep import overlap, report
from data_prep.choose import choose
from data_prep.convert import convert
from data_prep.examples import KINDS, TOO_LONG, Settings
from data_prep.sources import HUBS, find_sources
from data_prep.staging import Staging, write_split
from posttrain.common.files import REPOSITORY
from posttrain.data import tokenization
from posttrain.data.chat import TEMPLATES, ChatFormat
from posttrain.data.prepared import FORMAT, fingerprint_file

RECIPES = {"sft": "sft_qwen3_1.8b", "dpo": "dpo_qwen3_1.8b"}  # of posttrain/recipes, whose model lends its tokenizer
DUPLICATES = ("drop", "near", "keep")
MANY_DROPPED = 0.1


def parse(kind: str, argv: list[str]) -> argparse.Namespace:
    """The options of a command line; exits with a message where they contradict each other."""
    parser = argparse.ArgumentParser(
        prog=f"data_prep/prepare_{kind}.py",
        description=f"Prepare data for posttrain/{kind}.py: rows to token ids, once, offline.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset",
        action="append",
        metavar="NAME[:WEIGHT]",
        help=f"a dataset of the hub ({', '.join(HUBS[kind])}), or a file or folder of your own; can be given several times, with weights: "
        "0.5 takes half of its rows, 2 takes each twice",
    )
    parser.add_argument("--source", help="a local JSON, JSONL, CSV or Parquet file (or gzipped), or a folder of them, instead of the hub")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--tokenizer",
        help="that of the model to train: its folder or hub name, or a SentencePiece .model; default: the model of the recipe "
        f"{RECIPES[kind]}, if it is there",
    )
    parser.add_argument("--template", choices=TEMPLATES, default="chatml", help="chat format: ChatML, or the tokenizer's own template")
    parser.add_argument("--max_length", type=_count, default=2048, help="longest example in tokens (pairs: prompt and longer answer)")
    parser.add_argument("--too_long", choices=TOO_LONG, default="drop", help="what happens to longer ones; split_turns: SFT only")
    parser.add_argument("--max_samples", type=_count, help="use the first N rows of each source only")
    parser.add_argument("--system_prompt", help="system message for rows that have none")
    parser.add_argument(
        "--val_size", type=_count, help="validation rows; default 1 %%, at most 1000; the upstream's own split if it has one"
    )
    parser.add_argument("--duplicates", choices=DUPLICATES, default="drop", help="drop exact copies, drop near copies too, or keep all")
    parser.add_argument(
        "--decontaminate", action="append", default=[], metavar="FILE", help="drop rows that quote a benchmark's rows (a file or folder)"
    )
    parser.add_argument("--max_dropped", type=_share, default=MANY_DROPPED, help="refuse when a larger share of the rows is unusable")
    parser.add_argument("--revision", help="commit, tag or branch of the hub dataset")
    parser.add_argument("--seed", type=int, default=1337, help="which rows are for validation, and which a weight below 1 leaves out")
    options = parser.parse_args(argv)
    if not options.dataset and not options.source:
        parser.error("give --dataset, or --source with a file of your own")
    if options.source and options.dataset and len(options.dataset) > 1:
        parser.error("--source stands for one dataset; name files of your own as --dataset FILE to combine several")
    if not options.tokenizer:
        options.tokenizer = _model_of_recipe(kind)
        if not options.tokenizer:
            parser.error("whose token ids should the data have? Name the model to train: --tokenizer FOLDER_OR_HUB_NAME")
        print(f"--tokenizer is not given: taking that of {options.tokenizer}, the model of the recipe {RECIPES[kind]}", flush=True)
    return options


def _model_of_recipe(kind: str) -> str | None:
    """Return the model from which the shipped recipe of this kind starts; None where it is not there, looked for from here."""
    recipe = yaml.safe_load((REPOSITORY / "posttrain" / "recipes" / f"{RECIPES[kind]}.yaml").read_text())
    model = recipe["checkpoint_path" if kind == "sft" else "sft_checkpoint_path"]
    return model if Path(model).is_dir() else None


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def prepare(kind: str, argv: list[str]) -> None:
    """Read, encode, choose, write and report; `kind` is sft or dpo. Raises ValueError or OSError for what the user can mend."""
    options = parse(kind, argv)
    output = Path(options.output_dir)
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it or give another --output_dir")
    sources = find_sources(kind, options)
    tokenizer = tokenization.load_tokenizer(options.tokenizer, options.template)
    chat = ChatFormat(tokenizer, options.template)
    settings = Settings(options.max_length, options.too_long, options.system_prompt)
    identity = {"tokenizer": tokenization.fingerprint(tokenizer), "template": chat.hash, "template_name": chat.template}
    benchmarks = overlap.load_benchmarks(options.decontaminate)
    every = [*sources.training, *sources.held_out]
    request = {
        "format": FORMAT, "kind": kind, **identity, "settings": settings, "max_samples": options.max_samples,
        "near": options.duplicates == "near", "benchmarks": benchmarks.identity, "sources": [source.identity for source in every],
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Staging(output, request)
    for index, source in enumerate(every):
        held_out = index >= len(sources.training)
        convert(KINDS[kind](chat, settings), index, source, staging, options, overlap.NONE if held_out else benchmarks)
    chunks = [staging.chunks(index) for index in range(len(every))]
    chosen = choose(chunks, sources, options)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        **identity,
        "max_length": options.max_length,
        "options": {name: value for name, value in vars(options).items() if name not in ("output_dir", "val_size")},
        "sources": [source.label for source in every],
        **report.summary(chunks, every, chosen),
    }
    refuse_large_losses(manifest, options.max_dropped)
    whole = staging.folder / "whole"
    whole.mkdir()
    flat = [chunk for several in chunks for chunk in several]
    for name in ("train", "validation"):
        write_split(flat, chosen.counts[name], whole / name)
    report.write_dropped(chunks, every, chosen.left_out, whole / "dropped.jsonl")
    report.draw(chunks, chosen, options.max_length, whole / "lengths.png")
    manifest["files"] = {str(path.relative_to(whole)): fingerprint_file(path) for path in sorted(whole.rglob("*.arrow"))}
    tokenizer.save_pretrained(whole / "tokenizer")
    (whole / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    staging.publish(output)
    report.show(output, manifest)


def refuse_large_losses(manifest: dict, limit: float) -> None:
    """Raise ValueError where more than the share `limit` of the rows cannot be used; the message lists the causes."""
    unusable = {cause: entry for cause, entry in manifest["ledger"].items() if entry["unusable"]}
    lost, rows = sum(entry["rows"] for entry in unusable.values()), manifest["rows"]
    if lost > limit * rows:
        causes = "\n".join(f"    {entry['rows']:,}: {cause} (first: {entry['first']})" for cause, entry in unusable.items())
        raise ValueError(
            f"{lost:,} of {rows:,} rows ({lost / rows:.1%}) cannot be used, more than --max_dropped {limit:g}:\n{causes}\n"
            "Mend the rows, or allow it with a larger --max_dropped (the rows are not encoded again for that)"
        )


def main(run: Callable[[list[str]], None]) -> None:
    """Run a command with this process's arguments; a user's mistake ends it with one message and exit status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        run(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
