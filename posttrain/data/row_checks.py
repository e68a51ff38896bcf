"""Checks that the columns of prepared rows agree with each other: a stranger's folder may say what its rows do not hold."""

import numpy as np
import pyarrow as pa

from posttrain.data.manifest import again
from posttrain.data.parts import IGNORE
from posttrain.data.prepared import TOKENS, PreparedData, Split


def check_rows(data: PreparedData, directory: str, vocabulary: int) -> None:
    """Raise ValueError naming a row without tokens, with ids outside of the tokenizer's `vocabulary`, or with labels that are not its ids.

    Also where num_trained, by which steps are weighted, is not the number of labels.
    """
    for name, split in (("train", data.train), ("validation", data.validation)):
        try:
            if len(split):
                _check_split(split, vocabulary)
        except ValueError as error:
            make = again(data.manifest, f"{directory}_again")
            how = f" with\n    {make}" if make else " from its rows"
            raise ValueError(f"{directory}/{name} is damaged: {error}. Make it again{how}") from error


def _check_split(split: Split, vocabulary: int) -> None:
    """Raise ValueError naming the first row that is wrong; reads a chunk of the table at a time."""
    columns = {name: split.table.column(name).chunks for name in TOKENS[split.kind]}
    for name in columns:
        if (found := split.table.schema.field(name).type) != pa.list_(pa.int32()):
            raise ValueError(f"column {name} is of type {found}, expected lists of int32")
    begin = 0  # the row at which the chunks begin
    for chunks in zip(*columns.values(), strict=True):
        ends = [_ends(chunk) for chunk in chunks]
        values = [chunk.flatten().to_numpy() for chunk in chunks]
        for name, end, ids in zip(columns, ends, values, strict=True):
            if (empty := np.diff(end) == 0).any():
                raise ValueError(f"row {begin + empty.argmax()} has no tokens in {name}")
            wrong = (ids >= vocabulary) | (ids < 0) & ((name != "labels") | (ids != IGNORE))
            if wrong.any():
                row, token = begin + _row_of(wrong, end), ids[wrong.argmax()]
                raise ValueError(f"row {row} has the token id {token} in {name}; the tokenizer has {vocabulary:,} ids, from 0 on")
        if split.kind == "sft":
            _check_labels(*values, *ends, split.trained[begin : begin + len(chunks[0])], begin)
        begin += len(chunks[0])


def _check_labels(ids, labels, ends, label_ends, num_trained: np.ndarray, begin: int) -> None:
    """Raise ValueError naming a row whose labels are not `num_trained` of its ids, each at its place."""
    if (unlike := ends != label_ends).any():
        raise ValueError(f"row {begin + unlike.argmax() - 1} has another number of labels than of tokens")
    trained = labels != IGNORE
    if (other := trained & (labels != ids)).any():
        raise ValueError(f"row {begin + _row_of(other, ends)} has labels that are not its tokens")
    counts = np.add.reduceat(trained, ends[:-1], dtype=np.int64)
    if (lies := counts != num_trained).any():
        row = lies.argmax()
        raise ValueError(f"row {begin + row} trains {counts[row]} tokens, and its num_trained says {num_trained[row]}")


def _ends(chunk: pa.ListArray) -> np.ndarray:
    """Return where rows end in the chunk's values, 0 first."""
    offsets = chunk.offsets.to_numpy()
    return offsets - offsets[0]


def _row_of(wrong: np.ndarray, ends: np.ndarray) -> int:
    """Return the row of the first value that is wrong."""
    return int(np.searchsorted(ends, wrong.argmax(), side="right")) - 1
