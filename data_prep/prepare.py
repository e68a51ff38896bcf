"""From rows to a prepared folder: what prepare_sft.py and prepare_dpo.py share. The folder's format is described in posttrain/data.py.

The folder is written under a staging name and renamed when complete, so it is there whole or not at all.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets

from data_prep.sources import Hub, Refused, read_rows
from posttrain import chat, tokenization
from posttrain.data import FORMAT


def parse(kind: str, hub: dict[str, Hub], argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Prepare data for posttrain/{kind}.py: rows to token ids, once, offline.", allow_abbrev=False
    )
    parser.add_argument("--dataset", choices=sorted(hub), help="a dataset of the hub; with --source only a label")
    parser.add_argument("--source", help="a local JSON, JSONL(.gz), CSV or Parquet file, or a folder of them, instead of the hub")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--tokenizer", default="Qwen/Qwen3-1.7B-Base", help="the base model's folder or hub name, or a SentencePiece .model"
    )
    parser.add_argument("--max_length", type=_count, default=2048, help="longest example in tokens; longer ones are dropped and counted")
    parser.add_argument("--max_samples", type=_count, help="use the first N rows only")
    parser.add_argument("--system_prompt", help="system message for rows that have none")
    parser.add_argument("--val_size", type=_count, help="validation rows; default 1 %%, at most 1000")
    parser.add_argument("--seed", type=int, default=1337, help="which rows are for validation")
    arguments = parser.parse_args(argv)
    if not arguments.dataset and not arguments.source:
        parser.error("give --dataset, or --source with a file of your own")
    return arguments


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def prepare(kind: str, hub: dict[str, Hub], reader_for: Callable, encode: Callable, argv: list[str]) -> None:
    """Read, encode, split, write, report. `encode(tokenizer, item, options)` gives a row and its prompt text, or raises Refused."""
    options = parse(kind, hub, argv)
    output = Path(options.output_dir)
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it or give another --output_dir")
    tokenizer = tokenization.load_tokenizer(options.tokenizer)
    dataset = hub.get(options.dataset) if options.dataset else None
    label = options.dataset or Path(options.source).name
    ledger: Counter = Counter()
    examples: dict[str, str] = {}

    def encoded(split: str) -> Iterator[tuple[dict, str]]:
        reader = None
        for number, row in enumerate(read_rows(options.source, dataset, split)):
            if options.max_samples is not None and number >= options.max_samples:
                return
            reader = reader or reader_for(set(row))
            source = f"{label}:{number}"
            try:
                item, prompt = encode(tokenizer, reader(row), options)
            except (Refused, KeyError) as error:
                cause = str(error) if isinstance(error, Refused) else f"column {error} is missing"
                ledger[cause] += 1
                examples.setdefault(cause, source)
                continue
            yield {**item, "source": source}, prompt

    rows = list(encoded(dataset.train if dataset else "train"))
    if not rows:
        causes = "; ".join(f"{count} x {cause} (first: {examples[cause]})" for cause, count in ledger.items()) or "the source is empty"
        raise ValueError(f"no row of {label} can be trained on: {causes}")
    train, validation = _split(rows, options)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "dataset": label,
        "tokenizer": tokenization.fingerprint(tokenizer),
        "template": chat.template_hash(tokenizer),
        "max_length": options.max_length,
        "counts": {"train": len(train), "validation": len(validation)},
        "ledger": dict(ledger),
        "ledger_examples": examples,
    }
    _write(output, manifest, {"train": train, "validation": validation}, tokenizer)
    print(f"{output}: {len(train):,} rows for training, {len(validation):,} for validation, tokenizer {manifest['tokenizer']}")
    for cause, count in ledger.most_common():
        print(f"  dropped {count:,}: {cause} (first: {examples[cause]})")


def main(run: Callable[[list[str]], None]) -> None:
    """A user's mistake ends with one message and exit status 1."""
    try:
        run(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _split(rows: list[tuple[dict, str]], options) -> tuple[list[dict], list[dict]]:
    """By prompt: rows that share one are on the same side. Prompts are ranked by a keyed hash, so the choice does not depend on order."""
    size = min(1000, len(rows) // 100) if options.val_size is None else options.val_size
    if size >= len(rows):
        raise ValueError(f"--val_size {size} leaves nothing of {len(rows)} rows to train on")

    def rank(prompt: str) -> str:
        return hashlib.sha256(f"{options.seed}:{prompt}".encode()).hexdigest()

    prompts = Counter(prompt for _, prompt in rows)
    chosen, count = set(), 0
    for prompt in sorted(prompts, key=rank):
        if count + prompts[prompt] > size:
            continue
        chosen.add(prompt)
        count += prompts[prompt]
    return [row for row, prompt in rows if prompt not in chosen], [row for row, prompt in rows if prompt in chosen]


def _write(output: Path, manifest: dict, splits: dict[str, list[dict]], tokenizer) -> None:
    staging = output.with_name(output.name + ".incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    datasets.disable_progress_bars()
    for name, rows in splits.items():
        if rows:
            datasets.Dataset.from_list(rows).save_to_disk(str(staging / name))
    tokenizer.save_pretrained(staging / "tokenizer")
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    staging.rename(output)
