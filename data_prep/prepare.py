"""From rows to a prepared folder: what prepare_sft.py and prepare_dpo.py share. posttrain/data/prepared.py describes the folder's format.

    sources -> rows -> conversations -> examples (parts in DIR.incomplete) -> choose (duplicates, validation, weights) -> DIR

The folder is there whole or not at all; the same command after a kill goes on with the parts that are there, and gives the same bytes.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from data_prep import overlap, report
from data_prep.choose import Sources, choose
from data_prep.examples import KINDS, TOO_LONG, Changes, Settings, encode, finish, plan
from data_prep.files import Source, find_files
from data_prep.parts import Staging, table_of, write_split
from data_prep.sources import DPO_HUB, SFT_HUB, Refused, conversations
from posttrain.data import tokenization
from posttrain.data.chat import TEMPLATES, ChatFormat
from posttrain.data.prepared import FORMAT, fingerprint_file

HUBS = {"sft": SFT_HUB, "dpo": DPO_HUB}
CHUNK_ROWS, CHUNK_CHARACTERS = 2000, 8_000_000  # of a part
DUPLICATES = ("drop", "near", "keep")
MANY_DROPPED = 0.1

console = Console(highlight=False, soft_wrap=True)


def parse(kind: str, argv: list[str]) -> argparse.Namespace:
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
        "--tokenizer", default="Qwen/Qwen3-1.7B-Base", help="the base model's folder or hub name, or a SentencePiece .model"
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
    return options


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
    """Read, encode, choose, write, report. Raises ValueError or OSError for what the user can mend."""
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
    parts = [staging.parts(index) for index in range(len(every))]
    chosen = choose(parts, sources, options)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        **identity,
        "max_length": options.max_length,
        "options": {name: value for name, value in vars(options).items() if name not in ("output_dir", "val_size")},
        "sources": [source.label for source in every],
        **report.summary(parts, every, chosen),
    }
    refuse_large_losses(manifest, options.max_dropped)
    whole = staging.folder / "whole"
    whole.mkdir()
    flat = [part for several in parts for part in several]
    for name in ("train", "validation"):
        write_split(flat, chosen.counts[name], whole / name)
    report.write_dropped(parts, every, chosen.left_out, whole / "dropped.jsonl")
    report.draw(parts, chosen, options.max_length, whole / "lengths.png")
    manifest["files"] = {str(path.relative_to(whole)): fingerprint_file(path) for path in sorted(whole.rglob("*.arrow"))}
    tokenizer.save_pretrained(whole / "tokenizer")
    (whole / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    staging.publish(output)
    report.show(console, output, manifest)


def find_sources(kind: str, options) -> Sources:
    """The sources that --dataset and --source name. Raises ValueError for a name that is neither a dataset nor a file."""
    hub, training, held_out = HUBS[kind], [], []
    for given in options.dataset or [""]:
        name, weight = _weighted(given)
        place = options.source or (name if name not in hub else None)
        if place is None:
            dataset = hub[name]
            common = {"hub": dataset.name, "revision": options.revision}
            training.append(Source(name, weight, split=dataset.train, **common))
            if dataset.validation:
                held_out.append(Source(f"{name}/{dataset.validation}", split=dataset.validation, **common))
            continue
        if not options.source and not Path(place).exists():
            other = "dpo" if kind == "sft" else "sft"
            advice = f"it is a dataset for the other command, prepare_{other}.py" if name in HUBS[other] else "no such file"
            raise ValueError(f"--dataset {name}: {advice}; datasets of the hub: {', '.join(hub)}")
        files, test_files = find_files(place)
        names = [Path(_weighted(other)[0]).name for other in options.dataset or []]
        label = name if options.source and name else place if names.count(Path(place).name) > 1 else Path(place).name
        training.append(Source(label, weight, files))
        if test_files:
            held_out.append(Source(f"{label}/held out", files=test_files))
    if options.revision and not any(source.hub for source in training):
        raise ValueError("--revision names a version of a hub dataset, and no row comes from the hub; leave it out")
    labels = [source.label for source in training]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two sources are called {' and '.join(sorted(twice))}, so their rows could not be told apart; give each once")
    return Sources(training, held_out)


def _weighted(given: str) -> tuple[str, float]:
    name, colon, weight = given.rpartition(":")
    if not colon or Path(given).exists():
        return given, 1.0
    try:
        value = float(weight)
    except ValueError:
        return given, 1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--dataset {given}: the weight should be above 0")
    return name, value


def convert(kind, index: int, source: Source, staging: Staging, options, benchmarks: overlap.Benchmarks) -> None:
    """Encode the rows of a source into parts, from where an earlier call stopped."""
    done = staging.parts(index)
    if done and done[-1].facts["last"]:
        return
    start = done[-1].facts["next_row"] if done else 0
    number = len(done)
    near = options.duplicates == "near"
    with _without_gc(), report.RowProgress(console, source, options.max_samples, start) as advance, ThreadPoolExecutor(1) as background:
        pending: tuple[Future, tuple] | None = None

        def settle(job: tuple[Future, tuple]) -> None:
            nonlocal number
            future, (planned, changes, last) = job
            encoded, texts = future.result()
            examples, lost = [], []
            refused: set[int] = set()
            for row, result in finish(kind, planned, encoded, texts, changes):
                if not isinstance(result, Refused) and (quoted := benchmarks.quoted(result.text)):
                    result = Refused(f"{overlap.QUOTES} {quoted}")
                if isinstance(result, Refused):
                    if row not in refused:  # once a row, also where several of its pieces were
                        lost.append([row, str(result)])
                    refused.add(row)
                else:
                    examples.append((f"{source.label}:{row}", result))
            signatures = overlap.signatures(example.text for _, example in examples) if near else None
            rows = len(planned.numbers)
            next_row = planned.numbers[-1] + 1 if planned.numbers else start
            facts = {"next_row": next_row, "rows": rows, "dropped": lost, "changes": dict(changes), "last": last}
            staging.add(index, number, table_of(examples, kind.columns, signatures), facts)
            number += 1
            advance(rows)

        for chunk, last in _chunks(kind, source, start, options):
            changes = Changes()
            planned = plan(kind, chunk)
            job = (background.submit(encode, kind.chat, planned), (planned, changes, last))
            if pending:
                settle(pending)
            pending = job
        if pending:
            settle(pending)


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Millions of short lists without a cycle among them: the garbage collector's walks over them cost a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _chunks(kind, source: Source, start: int, options) -> Iterator[tuple[list, bool]]:
    """[(row number, conversation)] of limited size, and whether it is the source's last; borders depend on the rows alone."""
    chunk: list = []
    size, row = 0, -1
    for row, item in enumerate(conversations(kind.name, source.rows())):
        if options.max_samples is not None and row >= options.max_samples:
            break
        if row < start:
            continue
        if len(chunk) >= CHUNK_ROWS or size > CHUNK_CHARACTERS:
            yield chunk, False
            chunk, size = [], 0
        chunk.append((row, item))
        size += 0 if isinstance(item, Refused) else overlap.characters(item)
    yield chunk, True


def refuse_large_losses(manifest: dict, limit: float) -> None:
    unusable = {cause: entry for cause, entry in manifest["ledger"].items() if entry["unusable"]}
    lost, rows = sum(entry["rows"] for entry in unusable.values()), manifest["rows"]
    if lost > limit * rows:
        causes = "\n".join(f"    {entry['rows']:,}: {cause} (first: {entry['first']})" for cause, entry in unusable.items())
        raise ValueError(
            f"{lost:,} of {rows:,} rows ({lost / rows:.1%}) cannot be used, more than --max_dropped {limit:g}:\n{causes}\n"
            "Mend the rows, or allow it with a larger --max_dropped (the rows are not encoded again for that)"
        )


def main(run: Callable[[list[str]], None]) -> None:
    """A user's mistake ends with one message and exit status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        run(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
