"""From rows to a prepared folder: what prepare_sft.py and prepare_dpo.py share. posttrain/data/prepared.py describes the folder's format.

    sources -> rows -> conversations -> examples (chunks in DIR.incomplete) -> choose (duplicates, validation, weights) -> DIR

The folder is there whole or not at all; after a kill the same command goes on with the chunks that are there, and gives the same bytes.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from data_prep import overlap, report
from data_prep.choose import choose
from data_prep.convert import Encoding, convert
from data_prep.examples import KINDS, Settings
from data_prep.formats.remote import without_keys
from data_prep.options import look, parse
from data_prep.shapes.thinking import KEPT
from data_prep.sources import Source, Sources
from data_prep.staging import Staging, locked_staging, write_split
from data_prep.unseen import refuse_unseen
from data_prep.workers import beside
from posttrain.common.files import checksum
from posttrain.data import faster, tokenization
from posttrain.data.chat import ChatFormat
from posttrain.data.encoding import encoding_by
from posttrain.data.manifest import FORMAT

SMALL = 4_000_000  # bytes of all files

NO_OPTIONS = ("output_dir", "val_size", "workers")  # on which the rows do not depend, or that the counts say


def prepare(kind: str, argv: list[str]) -> None:
    """Do what prepare_sft.py or prepare_dpo.py does with a command line; `kind` is sft or dpo."""
    prepare_rows(kind, parse(kind, argv))


def prepare_rows(kind: str, options: argparse.Namespace) -> None:
    """Read, encode, choose, write and report. Raises ValueError or OSError for what the user can mend."""
    sources, output = look(kind, options), Path(options.output_dir)
    refuse_unseen([*sources.training, *sources.held_out])
    tokenizer = tokenization.load_tokenizer(options.tokenizer, options.template)
    chat = ChatFormat(tokenizer, options.template)
    settings = Settings(options.max_length, options.too_long, options.system_prompt, options.thinking)
    KINDS[kind](chat, settings)  # raises for settings that are not of this kind
    with beside(partial(tokenization.fingerprint, tokenizer), options.workers) as fingerprint:
        encoder, why = (None, "the data is small") if _is_small(sources) else faster.find(tokenizer)
        identity = {"tokenizer": fingerprint(), "template": chat.hash, "template_name": chat.template}
    benchmarks = overlap.load_benchmarks(options.decontaminate)
    every = [*sources.training, *sources.held_out]
    request = {
        "format": FORMAT, "kind": kind, **identity, "settings": settings, "max_samples": options.max_samples,
        "near": options.duplicates == "near", "benchmarks": benchmarks.identity, "sources": [source.identity for source in every],
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked_staging(output, request) as staging:
        jobs = [(source, benchmarks if index < len(sources.training) else overlap.NONE) for index, source in enumerate(every)]
        _encode(chat, (encoder, why), partial(KINDS[kind], settings=settings), jobs, staging, options)
        chunks = [staging.chunks(index) for index in range(len(every))]
        chosen = choose(chunks, sources, options)
        manifest = {
            "format": FORMAT,
            "kind": kind,
            **identity,
            "max_length": options.max_length,
            "options": {name: without_keys(value) for name, value in vars(options).items() if name not in NO_OPTIONS},
            "encoder": ", ".join(sorted(staging.encoders())),
            "sources": [source.label for source in every],
            **(summary := report.summary(chunks, every, chosen)),
            "thinks": any(note in summary["changes"] for note in KEPT.values()),  # a model that learns it is asked to
        }
        refuse_large_losses(manifest, options.max_dropped)
        whole = staging.folder / "whole"
        whole.mkdir()
        flat = [chunk for several in chunks for chunk in several]
        with beside(partial(report.draw, chunks, chosen, options.max_length, whole / "lengths.png"), options.workers) as draw:
            written = {name: write_split(flat, chosen.counts[name], whole / name, options.workers) for name in ("train", "validation")}
            manifest["files"] = {f"{name}/{file}": facts for name, several in written.items() for file, facts in sorted(several.items())}
            report.write_dropped(chunks, every, chosen.left_out, whole / "dropped.jsonl")
            tokenizer.save_pretrained(whole / "tokenizer")
            draw()
        (whole / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}, indent=2) + "\n", encoding="utf-8")
        staging.publish(output)
    report.show(output, manifest)


def _is_small(sources: Sources) -> bool:
    """Whether the tokenizer has encoded the files by the time in which a faster one would be proven."""
    every = [*sources.training, *sources.held_out]
    files = [file for source in every for file in source.files]
    if any(source.hub for source in every) or not all(isinstance(file, Path) for file in files):
        return False
    return sum(file.stat().st_size for file in files if isinstance(file, Path)) < SMALL


def _encode(chat: ChatFormat, found, kind, jobs: list[tuple[Source, overlap.Benchmarks]], staging: Staging, options) -> None:
    """Encode the rows of all sources: by what faster.find found as long as it gives the tokenizer's ids, else all by the tokenizer."""
    encoder, why = found
    plain = faster.plain_name(chat.tokenizer)
    if encoder and staging.encoders() - {encoder.name}:
        encoder, why = None, "it was begun so"
    name = encoder.name if encoder else plain
    print(f"encoding by {name}{f' ({why})' if why else ', which gives the ids of ' + plain}; up to {options.workers} at once", flush=True)
    try:
        with encoding_by(chat.tokenizer, encoder):
            for index, (source, benchmarks) in enumerate(jobs):
                convert(Encoding(kind(chat), name, encoder, options), index, source, staging, benchmarks)
    except faster.Differs as error:
        print(f"{name} gives other ids than {plain} for the text {error}: encoding all rows again, by {plain}", flush=True)
        staging.start_over()
        chat = ChatFormat(chat.tokenizer, chat.template)  # what it remembers was encoded by the other
        for index, (source, benchmarks) in enumerate(jobs):
            convert(Encoding(kind(chat), plain, None, options), index, source, staging, benchmarks)


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
