"""Reads rows of Parquet and Arrow files, some at a time."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet

from data_prep.formats import opening
from data_prep.formats.opening import File, Row, too_long
from posttrain.common.errors import first_line, shown, shown_name
from posttrain.common.limits import memory_limit
from posttrain.data.parts import Refused

BATCH_ROWS, BATCH_MEMORY = 16, 2**32  # at a time; more rows are hardly faster, and a value may be there once for all


def parquet_rows(file: File) -> Iterator[Row]:
    """Yield the rows of a Parquet file. Raises ValueError."""
    batches = parquet_batches(file)
    if (first := next(batches, None)) is not None:
        yield from rows_of(file, first.schema, itertools.chain([first], batches))


def parquet_batches(file: File) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of a Parquet file, BATCH_ROWS at a time. Raises ValueError."""
    with _errors_named(file), contextlib.nullcontext(file) if isinstance(file, Path) else file.open("rb") as opened:
        table = pyarrow.parquet.ParquetFile(opened, buffer_size=opening.BLOCK)
        _refuse_twice(file, table.schema_arrow)
        batches = table.iter_batches(batch_size=BATCH_ROWS, use_threads=False)
        while (batch := _within_bounds(batches)) is not None:
            yield batch


def _within_bounds(batches: Iterator[pyarrow.RecordBatch]) -> pyarrow.RecordBatch | None:
    """Return the next batch, None after the last; raises MemoryError where it takes too much."""
    with memory_limit(BATCH_MEMORY):
        return next(batches, None)


def _refuse_twice(file: File | str, schema: pyarrow.Schema) -> None:
    """Raise ValueError for two columns of one name."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{file}: two columns have the same name: {shown(schema.names)}")


def arrow_rows(file: File) -> Iterator[Row]:
    """Yield the rows of an Arrow file, or of a stream of Arrow, which datasets writes. Raises ValueError."""
    with _errors_named(file), pyarrow.memory_map(str(file)) if isinstance(file, Path) else file.open("rb") as opened:
        start = opened.read(6)
        opened.seek(0)
        if start == b"ARROW1":
            table = pyarrow.ipc.open_file(opened)
            batches: Iterable = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            table = batches = pyarrow.ipc.open_stream(opened)
        yield from rows_of(file, table.schema, batches)


class _errors_named:
    """Tells pyarrow's errors inside the block, and a lack of memory, as ValueErrors that name the file."""

    def __init__(self, file: File):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, MemoryError):  # pyarrow's is an ArrowException, too
            size = f"{BATCH_MEMORY >> 30} GiB"
            raise ValueError(f"{self.file}: {BATCH_ROWS} rows take more than {size}, which no rows for training do") from None
        if isinstance(error, pyarrow.ArrowException):
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"{self.file} cannot be read to its end, is it whole? ({why})") from error


def rows_of(file: File | str, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch], read: int = 0) -> Iterator[Row]:
    """Yield the rows of batches, before which `read` rows were read.

    Raises ValueError, naming `file`, for two columns of one name and for a row that is too long.
    """
    _refuse_twice(file, schema)
    parsers = {field.name: parser for field in schema if (parser := _parser(field.type))}
    batches = iter(batches)
    while (batch := _within_bounds(batches)) is not None:
        for start in range(0, len(batch), BATCH_ROWS):
            for part in _of_bounded_size(file, batch.slice(start, BATCH_ROWS), read + start):
                for row in map(_without_padding, _python_rows(file, part)):
                    yield _parsed(row, parsers) if parsers else row
        read += len(batch)


def _of_bounded_size(file: File | str, batch: pyarrow.RecordBatch, read: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield a batch, whose first row is number `read`, row by row where it is large. Raises ValueError for a row that is too long."""
    if batch.nbytes <= opening.LONGEST_LINE and not any(pyarrow.types.is_dictionary(field.type) for field in batch.schema):
        yield batch
        return
    for number in range(len(batch)):
        row = batch.slice(number, 1)
        columns = [one.dictionary_decode() if isinstance(one, pyarrow.DictionaryArray) else one for one in row.columns]
        if sum(column.nbytes for column in columns) > opening.LONGEST_LINE:
            raise too_long(file, f"row {read + number + 1}")
        yield pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)


def _python_rows(file: File | str, batch: pyarrow.RecordBatch) -> list[dict]:
    """Return the rows of a batch as Python values. Raises ValueError, which names the column, for a value that Python has not."""
    unreadable = (ValueError, OverflowError, LookupError)
    maps: Literal["strict"] | None = "strict" if "map<" in str(batch.schema.types) else None  # with it all takes five times as long
    try:
        return batch.to_pylist(maps_as_pydicts=maps)
    except unreadable:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist(maps_as_pydicts=maps)
            except unreadable as error:
                why = f"{type(error).__name__}: {first_line(error)}"
                raise ValueError(
                    f"{file}: the column {shown_name(name)}, of the type {column.type}, has a value that cannot be read ({why}): mend it, "
                    "or leave the column out"
                ) from None
        raise


def _without_padding(row: dict) -> dict:
    """Return the row without nulls: Arrow gives all objects of a column the same keys, with nulls where a row had none."""

    def bare(value):
        if isinstance(value, dict):
            return {name: bare(inner) for name, inner in value.items() if inner is not None}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return {name: bare(value) for name, value in row.items()}


def _parser(kind: pyarrow.DataType) -> Callable | None:
    """Return what makes the value of a type that holds texts of Arrow's JSON type; None for a type without any."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    types = pyarrow.types
    if types.is_struct(kind):
        inner = {field.name: parser for field in kind if (parser := _parser(field.type))}
        return (lambda value: _inside(value, inner)) if inner else None
    if types.is_map(kind):
        item = _parser(kind.item_type)
        return (lambda value: value and {key: item(one) for key, one in value.items()}) if item else None
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if any(is_one(kind) for is_one in lists):
        item = _parser(kind.value_type)
        return (lambda value: value and [item(one) for one in value]) if item else None
    if types.is_dictionary(kind):
        return _parser(kind.value_type)
    return None


def _inside(value: dict | None, parsers: dict[str, Callable]) -> dict | None:
    return value and {name: parsers[name](one) if name in parsers else one for name, one in value.items()}


def _parsed(row: dict, parsers: dict[str, Callable]) -> Row:
    """Return a row with its texts of JSON as values, or a Refused where one is no JSON."""
    done = dict(row)
    for name, parser in parsers.items():
        try:
            done[name] = parser(row.get(name))
        except (ValueError, RecursionError):
            return Refused(f"the column {shown_name(name)}, of Arrow's JSON type, holds a text that is no JSON")
    return done
