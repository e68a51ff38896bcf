"""Files of rows: all kinds give the same rows, every damaged file is named, and what holds no rows says so."""

import bz2
import contextlib
import datetime
import gzip
import hashlib
import io
import json
import lzma
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from bases import parquet

from data_prep.formats.pieces import pieces
from data_prep.formats.rows import file_rows
from posttrain.data.parts import Refused

ROWS = [{"prompt": "é", "response": "a"}, {"prompt": "q", "response": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,response\né,a\nq,b\n"


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def arrow(rows: list[dict], new=pyarrow.ipc.new_file) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue()


SAME = {
    "list.json": json.dumps(ROWS).encode(),
    "indented.json": ("\n" + json.dumps(ROWS, indent=1)).encode(),
    "blank.jsonl": ("\n" + LINES + "\n\n").encode(),
    "marked.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "lines.ndjson": LINES.replace("\n", "\r\n").encode(),
    "LINES.JSONL": LINES.encode(),
    "no_end": LINES.encode(),
    "pretty.json": "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS).encode(),
    "one_line.json": "".join(json.dumps(row) for row in ROWS).encode(),
    "wrapped.json": json.dumps({"version": 2, "data": ROWS}, indent=1).encode(),
    "first.json": json.dumps({"Data": ROWS, "version": 2, "by": {"a": ["b"]}}, indent=1).encode(),
    "wrapped.jsonl": json.dumps({"train": ROWS}).encode(),
    "table.csv": TABLE.encode(),
    "blank.csv": b"\n\n" + TABLE.encode(),
    "semicolons.csv": TABLE.replace(",", ";").encode(),
    "excel.csv": b"sep=;\r\n" + TABLE.replace(",", ";").replace("\n", "\r\n").encode(),
    "spaces.csv": TABLE.replace("prompt,response", " prompt , response ").encode(),
    "viewer.json": json.dumps({"rows": [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(ROWS)]}).encode(),
    "viewer.jsonl": "".join(json.dumps({"row_idx": n, "row": row}) + "\n" for n, row in enumerate(ROWS)).encode(),
    "tabs.csv": TABLE.replace(",", "\t").encode(),
    "table.tsv": TABLE.replace(",", "\t").encode(),
    "a.parquet": parquet(prompt=["é", "q"], response=["a", "b"]),
    "file.arrow": arrow(ROWS),
    "stream.arrow": arrow(ROWS, pyarrow.ipc.new_stream),
    "a.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "a.jsonl.zst": zstd(LINES.encode()),
    "a.csv.zst": zstd(TABLE.encode()),
    "list.json.zstd": zstd(json.dumps(ROWS).encode()),
    "two_frames.jsonl.zst": zstd(LINES[:30].encode()) + zstd(LINES[30:].encode()),
}
for name in ("utf-16", "utf-32"):
    SAME |= {f"{name}.jsonl": LINES.encode(name), f"{name}.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(name)}
    SAME |= {f"{name}.csv": TABLE.encode(name), f"{name}.csv.gz": gzip.compress(TABLE.encode(name))}
SAME["utf-16-be.tsv"] = b"\xfe\xff" + TABLE.replace(",", "\t").encode("utf-16-be")


@pytest.mark.parametrize("name", SAME)
def test_files_of_every_kind_give_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(SAME[name])
    assert list(file_rows(tmp_path / name)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.jsonl", b'{"a": 1}\n{"a": ', "line 2 is not valid JSON.*no line end, so the file may be cut"),
        ("cut.json", b'[{"a": 1}, ', "not valid JSON"),
        ("numbers.json", b"[1]", "row 1 is a int; expected an object"),
        ("numbers.jsonl", b'{"a": 1}\n7\n', "line 2 is a int; expected an object"),
        ("latin.json", b'[{"a": "\xff"}]', "not UTF-8 at byte 8"),
        ("utf16.jsonl", '{"a": 1}\n'.encode("utf-16") + b"\xd8", "is not UTF-16, as it begins"),
        ("unmarked.csv", "a,b\n1,2\n".encode("utf-16-le"), "is UTF-16 without a byte order mark"),
        ("number.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", "line 1 is not valid JSON"),
        ("deep.json", b"[" * 100_000, "not valid JSON"),
        ("cut.csv", b'a,b\n1,2\n3,"4', "not valid CSV"),
        ("twice.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999, mtime=0)[:40], "is it whole"),
        ("text.jsonl.gz", b"hello", "is it whole"),
        ("cut.parquet", b"PAR1", "is it whole"),
        ("cut.csv.zst", zstd(b"a\n" * 9999)[:15], "is it whole"),
        ("cut.csv.xz", lzma.compress(b"a\n" * 9999)[:40], "is it whole"),
        ("cut.csv.bz2", bz2.compress(b"a\n" * 9999)[:40], "is it whole"),
        ("wrong.csv.xz", b"hello", "is it whole"),
        ("cut.arrow", arrow([{"a": 1}])[:-40], "is it whole"),
        ("text.arrow", b"hello", "is it whole"),
        ("packed.tsv", zstd(b"a\tb\n"), "is packed by zstd; let its name end with .zst"),
        ("table.jsonl", parquet(a=["x"]), "is Parquet; let its name end with .parquet"),
        ("table.json", arrow([{"a": "x"}], pyarrow.ipc.new_stream), "is a stream of Arrow; let its name end with .arrow"),
        ("a.parquet.zst", zstd(parquet(a=["x"])), "Parquet packs its columns itself; unpack the file"),
        ("a.xlsx", b"PK\x03\x04", "has a name of no known kind; save the sheet as CSV"),
        ("a.tar.gz", b"\x1f\x8b", "has a name of no known kind; unpack it"),
        ("a.rows", b"{}", "has a name of no known kind; expected a JSON, JSONL, CSV, TSV, Parquet, Arrow or text file"),
        ("commas.jsonl", b'{"a": 1},\n{"a": 2},\n', "line 1 is not valid JSON: .*; a comma ends it, which no line of JSONL has"),
        ("lists.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n', "is each line a list of messages"),
        ("cut_wrapped.json", b'{\n"data": [{"a": 1}, {"a": 2}', "row 2 is not valid JSON: a comma should follow it, or the list's end"),
        ("open_wrapped.json", b'{\n"data": [{"a": 1}], "version": 2', "row 1 is not valid JSON: .*the file may be cut"),
        ("pretty_splits.json", b'{\n"train": [{"a": 1}],\n"test": [{"a": 2}]\n}', "holds the rows of train, test in one object"),
        ("pretty_system.json", b'{\n"data": [{"a": 1}], "system": "Be brief."\n}', "has system, which would be lost"),
        ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer.*git lfs pull"),
        ("columns.json", b'{"prompt": ["a", "b"], "response": ["c", "d"]}', "holds the columns .* as lists, not rows: write a list"),
        ("column.json", b'{"messages": [[{"role": "user"}], [{"role": "user"}]]}', "holds the columns .* as lists"),
        ("pandas.json", b'{"prompt": {"0": "a"}, "response": {"0": "c"}}', "holds the columns .* as objects"),
        ("apart.json", b'{"columns": ["a"], "data": [["x"]]}', "holds columns and data apart"),
        ("splits.json", b'{"train": [{"a": 1}], "test": [{"a": 2}]}', "holds the rows of train, test in one object"),
        ("system.json", b'{"system": "Be brief.", "data": [{"a": 1}]}', "the object around the rows has system, which would be lost"),
        ("commas.json", b'{\n"a": 1\n},\n{\n"a": 2\n}', "a comma follows row 1, but the file is no list"),
        ("cut_pretty.json", b'{\n"a": 1\n}\n{\n"a": ', "row 2 is not valid JSON"),
        ("json.txt", LINES.encode(), r"holds JSON: let its name end with .jsonl"),
        ("packed.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "is gzipped; let its name end with .gz"),
        ("packed.csv", gzip.compress(b"a\n1\n", mtime=0), "is gzipped; let its name end with .gz"),
        ("list.json", b'[\n{"a": 1}\n{"a": 2}]', "row 1 is not valid JSON: a comma should follow it"),
        ("inside.json", b'[\n{"a": 1},\n{"a" 2}, {}]', "row 2 is not valid JSON: Expecting ':' delimiter in line 3"),
        ("after.json", b'[{"a": 1}] {}', "something follows after the list's end"),
        ("comma.json", b'[{"a": 1}, ]', "row 2 is not valid JSON"),
        ("unended.json", b'[{"a": 1} ', "the list does not end, so the file may be cut"),
        ("date.parquet", parquet(a=["x"], d=pyarrow.array([2**30], pyarrow.date32())), "the column d, of the type date32.* cannot be read"),
        ("zone.parquet", parquet(d=pyarrow.array([5], pyarrow.timestamp("ns", tz="Nowhere/X"))), "the column d, .*Nowhere/X"),
        ("latin.parquet", parquet(a=pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())), "the column a, .*UnicodeDecode"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        list(file_rows(tmp_path / name))
    assert name in str(error.value)


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path):
    columns = [pyarrow.array([text]) for text in "abc"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "response", "response"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: two columns have the same name: \['prompt', 'response', 'response'\]"):
        list(file_rows(tmp_path / "a.parquet"))


def test_a_list_is_read_in_blocks_and_no_cut_is_missed(tmp_path, monkeypatch):
    rows = [{"é\U0001f642\\": '\u2028\n\t"', "n": [True, None, -1.5e-7, float("-inf")]}, {}, {"a": {"b": ["x" * 99]}}]
    path, content = tmp_path / "list.json", json.dumps(rows, indent=1, ensure_ascii=False).encode()
    for size in (1, 3, 50):
        monkeypatch.setattr("data_prep.formats.opening.BLOCK", size)
        path.write_bytes(content + b"\n ")
        assert list(file_rows(path)) == rows
    for end in range(1, len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"list.json(: row \d is not valid JSON| is not UTF-8 at byte)"):
            list(file_rows(path))


def test_rows_that_cannot_be_decoded_are_counted_not_fatal(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n{"a": "y"}\n')
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n\xff,2\n1,2,3\n")
    (tmp_path / "a.txt").write_bytes(b"x\n\xff\ny\n")
    assert [str(row) for row in file_rows(tmp_path / "a.jsonl")] == ["{'a': 'x'}", "not UTF-8", "{'a': 'y'}"]
    assert [str(row) for row in file_rows(tmp_path / "a.txt")] == ["{'text': 'x'}", "not UTF-8", "{'text': 'y'}"]
    assert [str(row) for row in file_rows(tmp_path / "a.csv")][1:] == ["not UTF-8", "more fields than the header has columns"]


def test_an_empty_file_has_no_rows(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt"):
        (tmp_path / name).write_text("")
        assert list(file_rows(tmp_path / name)) == []


def test_an_only_object_with_messages_is_a_row(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": messages}, {"prompt": messages[:1], "chosen": messages[1:], "rejected": messages[1:]}, {"data": messages}):
        for indent in (None, 2):
            (tmp_path / "one.json").write_text(json.dumps(row, indent=indent))
            assert list(file_rows(tmp_path / "one.json")) == [row]


def test_rows_in_an_object_may_be_more_than_a_row_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.formats.opening.LONGEST_LINE", 2**12)
    monkeypatch.setattr("data_prep.formats.opening.BLOCK", 100)
    rows = [{"text": "x" * 99 + str(number)} for number in range(200)]
    for indent in (None, 2):
        (tmp_path / "one.json").write_text(json.dumps({"data": rows, "version": 1}, indent=indent))
        assert list(file_rows(tmp_path / "one.json")) == rows
    (tmp_path / "many.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    assert list(file_rows(tmp_path / "many.json")) == rows


def test_a_text_is_split_as_asked(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n  two\r\n \r\n\r\nthree")
    assert [row["text"] for row in file_rows(path)] == ["one", "  two", "three"]
    assert [row["text"] for row in file_rows(path, "paragraph")] == ["one\r\n  two", "three"]
    assert [row["text"] for row in file_rows(path, "file")] == ["one\r\n  two\r\n \r\n\r\nthree"]


def test_columns_of_every_arrow_type_are_python_values(tmp_path):
    json_type, lists_of = pyarrow.json_(), pyarrow.ListArray.from_arrays

    def column(values, kind=None):
        return pyarrow.array(values, kind)

    def of_json(*texts):
        return pyarrow.ExtensionArray.from_storage(json_type, column(texts))

    columns = {
        "large": (column(["a", "b"], pyarrow.large_string()), ["a", "b"]),
        "view": (column(["a", "b"], pyarrow.string_view()), ["a", "b"]),
        "lists": (column([["a"], ["b"]], pyarrow.large_list(pyarrow.string())), [["a"], ["b"]]),
        "coded": (column(["a", "b"]).dictionary_encode(), ["a", "b"]),
        "map": (column([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())), [{"k": 1}, {}]),
        "struct": (column([{"x": 1, "y": None}, {"x": None, "y": 2}]), [{"x": 1}, {"y": 2}]),
        "day": (column([datetime.date(2020, 1, 2)] * 2), [datetime.date(2020, 1, 2)] * 2),
        "json": (of_json('{"a": [1, null]}', '"text"'), [{"a": [1, None]}, "text"]),
        "in_list": (lists_of([0, 2, 2], of_json('{"a": 1}', "2")), [[{"a": 1}, 2], []]),
        "in_struct": (
            pyarrow.StructArray.from_arrays([of_json("{}", "1"), column(["x", "y"])], ["f", "t"]),
            [{"f": {}, "t": "x"}, {"f": 1, "t": "y"}],
        ),
        "in_map": (pyarrow.MapArray.from_arrays([0, 1, 1], column(["k"]), of_json("[]")), [{"k": []}, {}]),
    }
    expected = [{name: values[row] for name, (_, values) in columns.items()} for row in range(2)]
    table = pyarrow.table({name: array for name, (array, _) in columns.items()})
    with contextlib.closing(pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb")) as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert list(file_rows(tmp_path / "a.arrow")) == expected
    in_parquet = table.drop_columns(["view"])
    pyarrow.parquet.write_table(in_parquet, tmp_path / "a.parquet")
    assert list(file_rows(tmp_path / "a.parquet")) == [{name: row[name] for name in in_parquet.column_names} for row in expected]


def test_a_cell_of_the_json_type_that_is_no_json_refuses_its_row(tmp_path):
    storage = pyarrow.array(['{"a": 1}', "{oops"])
    (tmp_path / "a.parquet").write_bytes(parquet(call=pyarrow.ExtensionArray.from_storage(pyarrow.json_(), storage)))
    first, second = file_rows(tmp_path / "a.parquet")
    assert first == {"call": {"a": 1}}
    assert isinstance(second, Refused) and str(second) == "the column call, of Arrow's JSON type, holds a text that is no JSON"


def test_arrow_batches_of_many_rows_are_in_memory_for_few(tmp_path):
    """A batch may hold all rows of a file; what they need as Python values is bounded."""
    table = pyarrow.table({"a": ["x" * 2**16] * 2000})
    with contextlib.closing(pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb")) as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    tracemalloc.start()
    assert sum(len(row["a"]) for row in file_rows(tmp_path / "a.arrow")) == 2000 * 2**16
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_line_that_is_alone_is_a_row(tmp_path):
    for number, line in enumerate(('{"messages": [{"speaker": "a"}]}', '{"ids": [1, 2], "labels": [3, 4]}', '{"a": [null]}')):
        (tmp_path / f"{number}.jsonl").write_text(line)
        assert list(file_rows(tmp_path / f"{number}.jsonl")) == [json.loads(line)]
    (tmp_path / "columns.jsonl").write_text('{"prompt": ["a", "b"], "response": ["c", "d"]}')
    with pytest.raises(ValueError, match="as lists, not rows"):
        list(file_rows(tmp_path / "columns.jsonl"))


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst"])
def test_a_file_cut_after_its_first_rows_is_named_where_it_is_read_in_pieces(tmp_path, name):
    lines = b"".join(b'{"text": "%s"}\n' % hashlib.sha256(b"%d" % number).hexdigest().encode() for number in range(20_000))
    packed = gzip.compress(lines, mtime=0) if name.endswith(".gz") else zstd(lines)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=rf"{name} cannot be read to its end, is it whole\?"):
        list(pieces(tmp_path / name, 2000, 8_000_000) or ())


def test_what_tables_write_for_a_missing_value_is_none(tmp_path):
    (tmp_path / "a.csv").write_text("a,b,c\nNaN,null,None\n<NA>,,none\n")
    assert list(file_rows(tmp_path / "a.csv")) == [{"a": None, "b": None, "c": None}, {"a": None, "b": "", "c": "none"}]


def test_cells_that_the_dataset_viewer_has_cut_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"rows": [{"row_idx": 0, "row": {"a": "b"}, "truncated_cells": ["a"]}]}))
    assert [str(row) for row in file_rows(tmp_path / "a.json")] == ["the dataset viewer has cut its cells: download the dataset itself"]
