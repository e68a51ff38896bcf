"""From rows to a prepared folder: what prepare_sft.py and prepare_dpo.py share. posttrain/data/prepared.py describes the folder's format.

    sources -> rows -> conversations -> examples (chunks in DIR.incomplete) -> choose (duplicates, validation, weights) -> DIR

The folder is there whole or not at all; after a kill the same command goes on with the chunks that are there, and gives the same bytes.
"""

import argparse
import json
from pathlib import Path

from data_prep import overlap, report
from data_prep.choose import choose
from data_prep.convert import convert
from data_prep.examples import KINDS, Settings
from data_prep.options import look, parse
from data_prep.shapes.thinking import KEPT
from data_prep.staging import locked_staging, write_split
from posttrain.common.files import checksum
from posttrain.data import tokenization
from posttrain.data.chat import ChatFormat
from posttrain.data.manifest import FORMAT
from posttrain.data.prepared import fingerprint_file


def prepare(kind: str, argv: list[str]) -> None:
    """Do what prepare_sft.py or prepare_dpo.py does with a command line; `kind` is sft or dpo."""
    prepare_rows(kind, parse(kind, argv))


def prepare_rows(kind: str, options: argparse.Namespace) -> None:
    """Read, encode, choose, write and report. Raises ValueError or OSError for what the user can mend."""
    sources, output = look(kind, options), Path(options.output_dir)
    tokenizer = tokenization.load_tokenizer(options.tokenizer, options.template)
    chat = ChatFormat(tokenizer, options.template)
    settings = Settings(options.max_length, options.too_long, options.system_prompt, options.thinking)
    identity = {"tokenizer": tokenization.fingerprint(tokenizer), "template": chat.hash, "template_name": chat.template}
    benchmarks = overlap.load_benchmarks(options.decontaminate)
    every = [*sources.training, *sources.held_out]
    request = {
        "format": FORMAT, "kind": kind, **identity, "settings": settings, "max_samples": options.max_samples,
        "near": options.duplicates == "near", "benchmarks": benchmarks.identity, "sources": [source.identity for source in every],
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked_staging(output, request) as staging:
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
            **(summary := report.summary(chunks, every, chosen)),
            "thinks": any(note in summary["changes"] for note in KEPT.values()),  # a model that learns it is asked to
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
        (whole / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}, indent=2) + "\n", encoding="utf-8")
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
