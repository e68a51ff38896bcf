"""Turns a source's rows into examples, a block at a time, with a ledger of what was dropped or changed.

Blocks are encoded by several processes. What is done is in the staging folder, from which a killed preparation goes on.
"""

import argparse
import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data_prep import overlap, report
from data_prep.blocks import Block, Item, blocks
from data_prep.examples import DPO, SFT, Example
from data_prep.proof import REFUSED, encode
from data_prep.shapes.function_calls import fitted
from data_prep.shapes.thinking import with_thinking
from data_prep.sources import Source
from data_prep.staging import HIDDEN, SPELLED, Staging, table_of
from data_prep.workers import work_on
from posttrain.common.visible import UNSEEN
from posttrain.data.chat import ChatFormat
from posttrain.data.faster import Faster
from posttrain.data.parts import Refused, Text


class Encoding(NamedTuple):
    """How rows are encoded, whatever source they are from."""

    kind: SFT | DPO
    encoder: str  # its name and version
    faster: Faster | None  # what encodes in the place of the tokenizer
    options: argparse.Namespace


def convert(encoding: Encoding, index: int, source: Source, staging: Staging, benchmarks: overlap.Benchmarks) -> None:
    """Encode the rows of source number `index` into chunks of the staging folder, from where an earlier call stopped."""
    done, options = staging.sound_chunks(index), encoding.options
    if done and done[-1].facts["last"]:
        return
    start = done[-1].facts["next_row"] if done else 0

    def work(number: int, piece: tuple[Block, bool]) -> int:
        return _write_chunk(encoding, (index, len(done) + number), source, staging, benchmarks, *piece)

    with _without_gc(), report.RowProgress(source, options.max_samples, start) as advance:
        cut = _with_last(blocks(encoding.kind.name, source, start, options.max_samples), start)
        with contextlib.closing(work_on(cut, work, options.workers)) as results:
            for rows in results:
                advance(rows)


def _with_last(cut: Iterator[Block], start: int) -> Iterator[tuple[Block, bool]]:
    """Yield each block, and whether it is the last; an empty one where there is none."""
    before = next(cut, Block(start, 0, 0, [], []))
    for block in cut:
        yield before, False
        before = block
    yield before, True


def _write_chunk(encoding: Encoding, chunk: tuple[int, int], source, staging, benchmarks, block: Block, last: bool) -> int:
    """Encode a block, write it as a chunk (the numbers of its source and of itself) with its ledger, and return how many rows it has."""
    kind, encoder, faster, options = encoding
    if faster:
        faster.begin(block.first == 0)
    unencoded = parts_of_rows(kind, block.read(kind.name, source))
    assert len(unencoded.numbers) == block.count, "a block does not hold the rows that were counted"
    changes: Counter[str] = Counter()
    examples, dropped = [], {}
    for row, result in examples_of_rows(kind, unencoded, changes):
        if not isinstance(result, Refused) and (quoted := benchmarks.quoted(result.text)):
            result = Refused(f"{overlap.QUOTES} {quoted}")
        if isinstance(result, Refused):
            dropped.setdefault(row, str(result))  # once for each row, also where several of its pieces were refused
        else:
            examples.append((f"{source.label}:{row}", result))
    signatures = overlap.signatures(example.text for _, example in examples) if options.duplicates == "near" else None
    facts = {
        "next_row": block.first + block.count,
        "rows": block.count,
        "dropped": list(dropped.items()),
        "changes": changes,
        "encoder": encoder,
        "last": last,
    }
    staging.add(*chunk, table_of(examples, kind.columns, signatures), facts)
    return block.count


class Unencoded(NamedTuple):
    """A chunk's rows before encoding."""

    numbers: list[int]
    items: list[Item]
    parts: list[list[list]]  # of each item; empty for a refused one
    given: set[int]  # numbers of the rows that were given the system prompt


def parts_of_rows(kind: SFT | DPO, numbered: Iterable[tuple[int, Item]]) -> Unencoded:
    """Split numbered conversations into parts, or note why they are refused."""
    chunk = Unencoded([], [], [], set())
    for number, item in numbered:
        parts: list[list] = []
        if not isinstance(item, Refused):
            try:
                asked, item = item, kind.with_system(item)
                if item is not asked:
                    chunk.given.add(number)
                item, parts = fitted(kind.chat, with_thinking(kind.chat, item, kind.settings.thinking), kind.parts)
            except Refused as cause:
                item = Refused(str(cause))  # without the traceback, which holds this frame and with it the whole chunk
        chunk.numbers.append(number)
        chunk.items.append(item)
        chunk.parts.append(parts)
    return chunk


def examples_of_rows(kind: SFT | DPO, chunk: Unencoded, changes: Counter[str]) -> Iterator[tuple[int, Example | Refused]]:
    """Encode a chunk and prove it; yield (row number, example or why there is none) in the order of the rows."""
    proven = encode(kind.chat, [parts for several in chunk.parts for parts in several])
    strange = _strange(kind.chat, chunk)
    at = 0
    for index, (number, item, parts) in enumerate(zip(chunk.numbers, chunk.items, chunk.parts, strict=True)):
        mine = proven[at : at + len(parts)]
        at += len(parts)
        if isinstance(item, Refused):
            yield number, item
            continue
        flaws = mine[0].flaws if len(mine) == 1 else {flaw for one in mine for flaw in one.flaws}
        try:
            for flaw in REFUSED if flaws else ():
                if flaw in flaws:
                    raise Refused(flaw)
            for example in [*kind.examples(item, mine, changes)]:
                yield number, example
        except Refused as cause:
            yield number, Refused(str(cause))
            continue
        for what in (*item.notes, *flaws, *strange.get(index, ())):
            changes[what] += 1
        if number in chunk.given:
            changes["given --system_prompt"] += 1


def _strange(chat: ChatFormat, chunk: Unencoded) -> dict[int, list[str]]:
    """Which of the rows, by their place in the chunk, hold hidden characters, or spell special tokens as text."""
    said = [[part.before + part.body for one in parts for part in one if isinstance(part, Text)] for parts in chunk.parts]
    found: dict[int, list[str]] = {}
    for what, is_so in ((HIDDEN, _hides), (SPELLED, chat.spells_special)):
        if is_so("\n".join(["\n".join(texts) for texts in said])):  # of hardly any chunk, which saves asking each row
            for index, texts in enumerate(said):
                if any(map(is_so, texts)):
                    found.setdefault(index, []).append(what)
    return found


def _hides(text: str) -> bool:
    """Whether a text holds characters that are not seen, or turn others around. Windows' line ends are none."""
    return not text.isascii() and bool(UNSEEN.search(text.replace("\r", "")))


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Run without the garbage collector: its walks over millions of short lists, without a cycle among them, cost a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
