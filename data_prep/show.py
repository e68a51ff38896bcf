"""Shows rows as the model sees them, in the terminal or as a page, and proves them again; preview.py is the command."""

import argparse
import html
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from data_prep.proof import answer_texts, proof, span_texts, without_ends
from posttrain.common.visible import visible
from posttrain.data import tokenization
from posttrain.data.chat import ChatFormat
from posttrain.data.encoded import trained_spans
from posttrain.data.encoding import decode_after
from posttrain.data.manifest import read_manifest, unused_columns
from posttrain.data.parts import IGNORE
from posttrain.data.prepared import Split, fingerprint_file, load_prepared

HOW = "prepare_sft.py or prepare_dpo.py"  # makes a folder that can be shown
TRAINED, SPECIAL = "bold green", "dim"
SHOWN_FAILURES = 10


class Piece(NamedTuple):
    """Tokens that read as one text."""

    text: str
    ids: list[int]
    trained: bool
    special: bool


class Block(NamedTuple):
    """A row, or one of the three columns of a pair."""

    title: str
    pieces: list[Piece]


def show(options: argparse.Namespace) -> None:
    """Show or check the rows of a prepared folder, as the options of preview.py ask. Raises ValueError if a check fails."""
    kind = read_manifest(options.directory, HOW)["kind"]
    loaded = load_prepared(options.directory, kind, HOW, checksums=False)  # --check finds the row
    manifest = loaded.manifest
    tokenizer = tokenization.load_tokenizer(Path(options.directory) / "tokenizer", manifest["template_name"])
    chat = ChatFormat(tokenizer, manifest["template_name"])
    splits = {"train": loaded.train, "validation": loaded.validation}
    if options.check:
        _check(Path(options.directory), chat, manifest, splits)
        return
    split = splits[options.split]
    if not len(split):
        raise ValueError(f"{options.directory} has no {options.split} rows")
    if options.row is not None and not 0 <= options.row < len(split):
        raise ValueError(f"--row {options.row}: {options.directory} has the {options.split} rows 0 to {len(split) - 1}")
    count = min(options.rows, len(split))
    numbers = [options.row] if options.row is not None else [i * len(split) // count for i in range(count)]
    rows = [(number, split[number]) for number in numbers]
    shown = [(number, row["source"], blocks(chat, kind, row)) for number, row in rows]
    if options.html:
        Path(options.html).write_text(_page(options.directory, options.split, shown, options.ids), encoding="utf-8")
        print(f"wrote {options.html}")
        return
    console = Console(highlight=False)
    coloured = console.color_system is not None
    for number, source, parts in shown:
        console.rule(
            f"{options.split} {number} · {escape(visible(source))} · {sum(len(p.ids) for b in parts for p in b.pieces)} tokens",
            style="blue",
        )
        answers = [Panel(_rich(block, options.ids, coloured), title=block.title, title_align="left") for block in parts[1:]]
        console.print(_rich(parts[0], options.ids, coloured))
        if answers:
            width = (console.width - 2) // 2
            console.print(Columns(answers, width=width) if width > 40 else answers[0])
            if width <= 40:
                console.print(answers[1])
    for note in unused_columns(manifest):
        console.print(escape(visible(f"note: {note}")))
    legend = [("trained", TRAINED), "  ", ("special tokens", SPECIAL)] if coloured else ["\u27e6trained\u27e7"]
    console.print(Text.assemble(*legend, "  everything else is read, not trained"))


def blocks(chat: ChatFormat, kind: str, row: dict) -> list[Block]:
    """A stored row as what is shown of it: one Block, or prompt, chosen and rejected."""
    if kind == "sft":
        return [Block("", _pieces(chat, row["input_ids"], row["labels"]))]
    prompt = Block("prompt", _pieces(chat, row["prompt"], [IGNORE] * len(row["prompt"])))
    return [prompt, *(Block(name, _pieces(chat, row[name], row[name])) for name in ("chosen", "rejected"))]


def failures(chat: ChatFormat, kind: str, row: dict, max_length: int) -> Iterator[str]:
    """Yield what is wrong with a stored row; nothing for a sound one."""
    if kind == "sft":
        ids, labels = row["input_ids"], row["labels"]
        length, texts = len(ids), span_texts(chat, ids, labels)
        if len(ids) != len(labels) or any(label not in (IGNORE, token) for token, label in zip(ids, labels, strict=False)):
            yield "labels are not the tokens themselves"
        if row["num_trained"] != sum(label != IGNORE for label in labels[1:]):
            yield "num_trained is not the number of trained tokens"
        if not row["num_trained"]:
            yield "nothing is trained"
        inside = [token for start, end in trained_spans(labels) for token in ids[start : end - 1]]
    else:
        prompt, answers = row["prompt"], [row["chosen"], row["rejected"]]
        length = len(prompt) + max(map(len, answers))
        texts = answer_texts(chat, prompt, answers)
        if answers[0] == answers[1]:
            yield "chosen equals rejected"
        inside = [token for body in without_ends(chat, answers) for token in body]
    if length > max_length:
        yield f"{length} tokens, more than {max_length}"
    if chat.template == "chatml" and (chat.special_ids - chat.thinking_ids) & set(inside):
        yield "a special token stands inside a trained text"
    if proof(texts) != row["proof"]:
        yield "its trained tokens do not read as the text that they were made from"


def _check(directory: Path, chat: ChatFormat, manifest: dict, splits: dict[str, Split]) -> None:
    """Prove every row again, with the tokenizer in the folder. Raises ValueError if one fails."""
    identity = {"tokenizer": tokenization.fingerprint(chat.tokenizer), "template": chat.hash}
    found = [f"the {what} in the folder is not the one that made it" for what, value in identity.items() if manifest[what] != value]
    for name, stored in manifest["files"].items():
        if fingerprint_file(directory / name) != stored:
            found.append(f"{name} is not the file that was prepared")
    checked = 0
    for name, split in splits.items():
        for number in range(len(split)):
            row = split[number]
            found += [
                f"{name} {number} ({row['source']}): {what}" for what in failures(chat, manifest["kind"], row, manifest["max_length"])
            ]
            checked += 1
    if found:
        more = f"\n    and {len(found) - SHOWN_FAILURES} more" if len(found) > SHOWN_FAILURES else ""
        raise ValueError(f"{len(found)} failures in {checked:,} rows:\n    " + "\n    ".join(found[:SHOWN_FAILURES]) + more)
    print(f"{checked:,} rows checked, 0 failures")


def _pieces(chat: ChatFormat, ids: list[int], labels: list[int]) -> list[Piece]:
    """Token ids as pieces that are all trained or none, all special tokens or none, with their texts."""
    pieces: list[Piece] = []
    for token, label in zip(ids, labels, strict=True):
        kind = (label != IGNORE, token in chat.special_ids)
        if pieces and (pieces[-1].trained, pieces[-1].special) == kind:
            pieces[-1].ids.append(token)
        else:
            pieces.append(Piece("", [token], *kind))
    headers = [before.ids if not before.special else [] for before in [Piece("", [], False, True), *pieces]][: len(pieces)]
    texts = decode_after(chat.tokenizer, headers, [piece.ids for piece in pieces])
    return [piece._replace(text=text) for piece, text in zip(pieces, texts, strict=True)]


def _rich(block: Block, ids: bool, coloured: bool) -> Text:
    """A block in colours, or with what is trained in brackets where there are none, as in a file."""
    text, within = Text(), False
    for piece in [*block.pieces, Piece("", [], False, False)]:
        if piece.trained != within and not coloured:
            text.append("\u27e6" if piece.trained else "\u27e7")
        within = piece.trained
        text.append(visible(piece.text), style=" ".join(style for style, on in ((TRAINED, piece.trained), (SPECIAL, piece.special)) if on))
        if ids and piece.ids:
            text.append(f" {piece.ids} ", style="yellow")
    return text


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>%(title)s</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: .85rem; font-weight: 600; opacity: .7; margin: 1.6rem 0 .4rem; }
.row { border: 1px solid #8884; border-radius: 8px; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; margin-top: .8rem; } h3 { font-size: .8rem; margin: 0 0 .3rem; }
.t { background: #2da44e33; border-radius: 3px; } .s { opacity: .5; font-family: ui-monospace, monospace; font-size: .85em; }
.i { color: #9a6700; font: .75em ui-monospace, monospace; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
</style>
<h1>%(title)s</h1>
<p><span class="t">trained</span> &nbsp; <span class="s">special tokens</span> &nbsp; everything else is read, not trained</p>
%(rows)s
</html>
"""


def _page(directory: str, split: str, shown: list[tuple[int, str, list[Block]]], ids: bool) -> str:
    """The HTML page of some rows, each as (number, source, blocks)."""
    rows = []
    for number, source, parts in shown:
        rows.append(f'<h2>{split} {number} · {html.escape(visible(source))}</h2><div class="row" dir="auto">{_html(parts[0], ids)}</div>')
        if parts[1:]:
            answers = (f'<div class="row" dir="auto"><h3>{block.title}</h3>{_html(block, ids)}</div>' for block in parts[1:])
            rows.append(f'<div class="pair">{"".join(answers)}</div>')
    return PAGE % {"title": html.escape(f"{directory}: {split} rows as the model sees them"), "rows": "\n".join(rows)}


def _html(block: Block, ids: bool) -> str:
    """A block as HTML."""
    spans = []
    for piece in block.pieces:
        classes = " ".join(name for name, on in (("t", piece.trained), ("s", piece.special)) if on)
        spans.append(f'<span class="{classes}">{html.escape(visible(piece.text))}</span>')
        if ids:
            spans.append(f'<span class="i">{html.escape(str(piece.ids))}</span>')
    return "".join(spans)
