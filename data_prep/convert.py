"""Turns a source's rows into examples, a chunk at a time, with a ledger of what was dropped or changed.

Encoding, the slow half, runs beside the reading of the next chunk. What is done is in the staging folder, from which a killed
preparation goes on.
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from data_prep import overlap, report
from data_prep.examples import DPO, SFT, UNPROVEN, Example
from data_prep.proof import lacks_characters, prove
from data_prep.shapes.conversations import conversations
from data_prep.shapes.function_calls import fitted
from data_prep.shapes.messages import Chat, Document, Pair
from data_prep.shapes.thinking import with_thinking
from data_prep.sources import Source
from data_prep.staging import HIDDEN, Staging, table_of
from posttrain.common.visible import UNSEEN
from posttrain.data.chat import ChatFormat, encode_parts
from posttrain.data.parts import Encoded, Refused, Text

CHUNK_ROWS, CHUNK_CHARACTERS = 2000, 8_000_000  # of a chunk; the row that exceeds the latter is still in it
LACKING = "the vocabulary lacks characters of it"
APART = "white space at an answer's start kept apart from the template's"  # apply_chat_template would give it other ids


def convert(kind: SFT | DPO, index: int, source: Source, staging: Staging, options, benchmarks: overlap.Benchmarks) -> None:
    """Encode the rows of source number `index` into chunks of the staging folder, from where an earlier call stopped."""
    done = staging.sound_chunks(index)
    if done and done[-1].facts["last"]:
        return
    start = done[-1].facts["next_row"] if done else 0
    number = len(done)
    with _without_gc(), report.RowProgress(source, options.max_samples, start) as advance:
        for chunk, last, job in _encoded_ahead(kind, _chunks(kind, source, start, options)):
            changes: Counter[str] = Counter()
            examples, dropped = [], {}
            for row, result in examples_of_rows(kind, chunk, *job.result(), changes):
                if not isinstance(result, Refused) and (quoted := benchmarks.quoted(result.text)):
                    result = Refused(f"{overlap.QUOTES} {quoted}")
                if isinstance(result, Refused):
                    dropped.setdefault(row, str(result))  # once for each row, also where several of its pieces were refused
                else:
                    examples.append((f"{source.label}:{row}", result))
            signatures = overlap.signatures(example.text for _, example in examples) if options.duplicates == "near" else None
            facts = {
                "next_row": chunk.numbers[-1] + 1 if chunk.numbers else start,
                "rows": len(chunk.numbers),
                "dropped": list(dropped.items()),
                "changes": changes,
                "last": last,
            }
            staging.add(index, number, table_of(examples, kind.columns, signatures), facts)
            advance(len(chunk.numbers))
            number += 1
            del chunk, job, examples  # else they would stay in memory while the chunk after the next is read


def _encoded_ahead(kind: SFT | DPO, chunks: Iterable[tuple[list, bool]]) -> Iterator[tuple["Unencoded", bool, Future]]:
    """Yield each chunk, whether it is the last, and its encoding, which another thread does while the next chunk is read."""
    with ThreadPoolExecutor(1) as background:
        pending = None
        for rows, last in chunks:
            chunk = parts_of_rows(kind, rows)
            job = chunk, last, background.submit(encode, kind.chat, chunk)
            if pending:
                yield pending
            pending = job
        if pending:
            yield pending


class Unencoded(NamedTuple):
    """A chunk's rows before encoding."""

    numbers: list[int]
    items: list[Document | Chat | Pair | Refused]
    parts: list[list[list]]  # of each item; empty for a refused one
    given: set[int]  # numbers of the rows that were given the system prompt


def parts_of_rows(kind: SFT | DPO, numbered: Iterable[tuple[int, Document | Chat | Pair | Refused]]) -> Unencoded:
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


def encode(chat: ChatFormat, chunk: Unencoded) -> tuple[list[list[Encoded]], list[list[str] | None]]:
    """Encode the parts of a chunk and prove them (see proof.prove). Runs in another thread: the tokenizer's own code holds no lock."""
    encoded = encode_parts(chat, (parts for several in chunk.parts for parts in several))
    return encoded, prove(chat, encoded)


def examples_of_rows(kind: SFT | DPO, chunk: Unencoded, encoded, texts, changes: Counter[str]) -> Iterator[tuple[int, Example | Refused]]:
    """Yield (row number, example or why there is none) in the order of the rows; `encoded` and `texts` are what encode returned."""
    at = 0
    for number, item, parts in zip(chunk.numbers, chunk.items, chunk.parts, strict=True):
        mine = slice(at, at + len(parts))
        at += len(parts)
        if isinstance(item, Refused):
            yield number, item
            continue
        if lacks_characters(kind.chat, encoded[mine], trained=True):
            yield number, Refused(LACKING)
            continue
        if None in texts[mine]:
            yield number, Refused(UNPROVEN)
            continue
        try:
            examples = list(kind.examples(item, encoded[mine], texts[mine], changes))
            changes.update(item.notes)
            if lacks_characters(kind.chat, encoded[mine], trained=False):
                changes[f"{LACKING}: in what is read, not trained"] += 1
            if any(part.apart for parts in encoded[mine] for part in parts):
                changes[APART] += 1
            yield from ((number, example) for example in examples)
            if any(_hides(part.before + part.body) for several in parts for part in several if isinstance(part, Text)):
                changes[HIDDEN] += 1
            if number in chunk.given:
                changes["given --system_prompt"] += 1
        except Refused as cause:
            yield number, Refused(str(cause))


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


def _chunks(kind, source: Source, start: int, options) -> Iterator[tuple[list, bool]]:
    """Yield [(row number, conversation), ...] of limited size, and whether it is the last; where chunks end depends on the rows alone."""
    chunk: list = []
    size, row = 0, -1
    for row, item in enumerate(conversations(kind.name, source.rows(), source.columns)):
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
