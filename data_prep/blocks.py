"""Cuts a source into blocks of rows without reading what they say, so that several processes can.

Lines of JSONL and batches of Parquet go to the workers as they are in the file. A file that has to be read from its beginning on (CSV, a
JSON list) is sent as rows; rows of the hub, and rows that say something only together (trees of messages), as conversations.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from data_prep import overlap
from data_prep.formats.pieces import Piece, pieces
from data_prep.formats.rows import Row
from data_prep.shapes.columns import UnknownShape
from data_prep.shapes.conversations import TREE_COLUMNS, UNKNOWN, conversations, read_row
from data_prep.shapes.messages import Chat, Document, Pair
from data_prep.sources import Source
from posttrain.data.parts import Refused

Item = Document | Chat | Pair | Refused
BLOCK_ROWS, BLOCK_BYTES = 2000, 8_000_000  # of a block; the row that exceeds the latter is still in it


class Block(NamedTuple):
    """Consecutive rows of a source: pieces of files and lists of rows, or conversations."""

    first: int  # number of the first row
    skip: int  # how many rows of what is held come before it
    count: int  # how many rows are meant; more may be held
    pieces: list[Piece | list[Row]]
    items: list[Item]

    def read(self, kind: str, source: Source) -> Iterator[tuple[int, Item]]:
        """Yield (row number, conversation or why it cannot be used). Raises ValueError for a file that is not what its name says."""
        rows = (row for piece in self.pieces for row in (piece if isinstance(piece, list) else piece.rows()))
        said = (row if isinstance(row, Refused) else read_row(kind, row, source.columns) for row in rows)
        wanted = slice(self.skip, self.skip + self.count)
        return enumerate(itertools.chain(self.items[wanted], itertools.islice(said, wanted.start, wanted.stop)), self.first)


def blocks(kind: str, source: Source, start: int, most: int | None) -> Iterator[Block]:
    """Yield the blocks of a source from row `start` on, none of a row after the first `most`.

    Where they end depends on the rows alone. Raises ValueError for a source that cannot be read, and where no row is of a known shape.
    """
    if not source.hub and _each_alone(kind, source):
        joined = _joined(_parts(source, most))
    else:
        items = itertools.islice(conversations(kind, source.rows(), source.columns), most)
        joined = ((count, [], some) for count, _, some in _lists(items, _length))
    first = 0
    for count, held, some in joined:
        begin, end = max(first, start), first + count if most is None else min(first + count, most)
        if begin < end:
            yield Block(begin, begin - first, end - begin, held, some)
        first += count
        if most is not None and first >= most:
            return


def _joined(parts: Iterable[tuple[int, int, Piece | list[Row]]]) -> Iterator[tuple[int, list[Piece | list[Row]], list[Item]]]:
    """Yield (rows, parts, no items) of as many consecutive parts as a block has room for: many files may be small."""
    held, count, size = [], 0, 0
    for rows, length, part in parts:
        if count and (count + rows > BLOCK_ROWS or size + length > BLOCK_BYTES):
            yield count, held, []
            held, count, size = [], 0, 0
        held.append(part)
        count, size = count + rows, size + length
    if count:
        yield count, held, []


def _each_alone(kind: str, source: Source) -> bool:
    """Whether each row of a source can be read without the others: not messages of trees, nor rows of which none is of a known shape."""
    unknown = 0
    for given in source.rows():
        if isinstance(given, Refused):
            continue
        if kind == "sft" and TREE_COLUMNS.issubset(given):
            return False
        if not isinstance(read_row(kind, given, source.columns), UnknownShape):
            return True
        unknown += 1
        if unknown >= UNKNOWN:
            return False
    return False


def _parts(source: Source, most: int | None) -> Iterator[tuple[int, int, Piece | list[Row]]]:
    """Yield (rows, bytes, piece or rows) of a source's files, of each of which at most `most` rows are wanted."""
    for path in source.files:
        cut = pieces(path, BLOCK_ROWS, BLOCK_BYTES)
        yield from _lists(itertools.islice(source._replace(files=(path,)).rows(), most), _size) if cut is None else cut


def _lists(values: Iterable, size_of: Callable) -> Iterator[tuple[int, int, list]]:
    """Yield (how many, size, values) in lists of limited size."""
    held, size = [], 0
    for value in values:
        if len(held) >= BLOCK_ROWS or size > BLOCK_BYTES:
            yield len(held), size, held
            held, size = [], 0
        held.append(value)
        size += size_of(value)
    if held:
        yield len(held), size, held


def _length(item: Item) -> int:
    return 0 if isinstance(item, Refused) else overlap.characters(item)


def _size(value) -> int:
    """How many characters the texts inside of a row have, about."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 1
