"""Finds rows that repeat each other (near copies, by MinHash of the datasketch library) or quote a benchmark (shared word sequences)."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH

from data_prep.folders import find_files
from data_prep.formats.rows import file_rows
from data_prep.shapes.messages import Chat, Document, Pair
from data_prep.sources import facts_of
from data_prep.staging import Chunk
from posttrain.data.parts import Refused

SIMILAR = 0.8  # Jaccard similarity of two rows' word 5-grams, above which they are near copies
SHINGLE, PERMUTATIONS = 5, 128
SKETCH = {"num_perm": PERMUTATIONS, "seed": 1, "scheme": "affine32"}
QUOTED_WORDS = 13  # words in a row shared with a benchmark row that make a quotation, as for GPT-3 (arXiv:2005.14165, appendix C)
QUOTES = "quotes a row of"


class Benchmarks(NamedTuple):
    """Word sequences of benchmark rows: those of QUOTED_WORDS words, and whole texts of fewer (but at least 5) words."""

    sequences: dict[str, str]  # sequence -> the file it is from
    lengths: tuple[int, ...]
    identity: list

    def quoted(self, text: str) -> str | None:
        """Name the file of a benchmark row that the text quotes; None without one."""
        if not self.sequences:
            return None
        words = _words(text)
        for length in self.lengths:
            for start in range(len(words) - length + 1):
                if file := self.sequences.get(" ".join(words[start : start + length])):
                    return file
        return None


NONE = Benchmarks({}, (), [])


def load_benchmarks(places: list[str]) -> Benchmarks:
    """Collect every text of at least 5 words in the given files' rows (questions, answers, choices). Raises as find_files does."""
    sequences: dict[str, str] = {}
    identity = []
    for place in places:
        for path in find_files(place).training:
            identity.append(facts_of(path))
            for row in file_rows(path):
                for text in [] if isinstance(row, Refused) else _texts(row):
                    words = _words(text)
                    length = min(QUOTED_WORDS, len(words))
                    if length >= SHINGLE:
                        for start in range(len(words) - length + 1):
                            sequences.setdefault(" ".join(words[start : start + length]), path.name)
    if places and not sequences:
        raise ValueError(f"--decontaminate {' '.join(places)}: no row holds a text of {SHINGLE} words or more")
    return Benchmarks(sequences, tuple(sorted({len(sequence.split()) for sequence in sequences})), identity)


def signatures(texts: Iterable[str]) -> list[np.ndarray]:
    """The MinHash of each text's word 5-grams, (PERMUTATIONS,) uint32."""
    shingles = []
    for text in texts:
        words = _words(text)
        words = words or [text]  # signs and emoji only
        grams = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        shingles.append([gram.encode() for gram in sorted(grams)])
    return [sketch.hashvalues.astype(np.uint32) for sketch in MinHash.bulk(shingles, **SKETCH)]


def near_copies(chunks: list[Chunk], among: np.ndarray) -> np.ndarray:
    """Which of the examples `among` are similar to an earlier one of them that is kept; (examples,) bool."""
    index = MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS)
    kept: dict[int, MinHash] = {}
    copies = np.zeros(len(among), bool)
    at = 0
    for chunk in chunks:
        for values in chunk.table().column("_signature").to_pylist():
            if among[at]:
                sketch = MinHash(**SKETCH, hashvalues=np.array(values, np.uint64))
                copies[at] = any(sketch.jaccard(kept[other]) >= SIMILAR for other in index.query(sketch))
                if not copies[at]:
                    index.insert(at, sketch)
                    kept[at] = sketch
            at += 1
    return copies


def characters(item: Document | Chat | Pair) -> int:
    """How many characters a conversation holds."""
    if isinstance(item, Document):
        return len(item.text)
    if isinstance(item, Chat):
        return sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in item.messages)
    return sum(len(message["content"]) for message in item.prompt) + len(item.chosen) + len(item.rejected)


def _texts(value) -> Iterator[str]:
    """Yield every text inside nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
