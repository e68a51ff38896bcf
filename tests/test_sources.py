"""Files and folders of rows: all kinds give the same rows, every damaged file is named."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from bases import parquet

from data_prep.formats.rows import file_rows
from data_prep.sources import find_files

ROOT = Path(__file__).resolve().parents[1]


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    rows = [{"prompt": "é", "response": "a"}, {"prompt": "q", "response": "b"}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "indented.json").write_text("\n" + json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl").write_text("\n" + lines + "\n\n")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.csv").write_text("prompt,response\né,a\nq,b\n")
    (tmp_path / "blank.csv").write_text("\n\nprompt,response\né,a\nq,b\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert list(file_rows(path)) == rows, path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.jsonl", b'{"a": 1}\n{"a": ', "line 2 is not valid JSON.*no line end, so the file may be cut"),
        ("cut.json", b'[{"a": 1}, ', "not valid JSON"),
        ("numbers.json", b"[1]", "row 1 is a int; expected an object"),
        ("numbers.jsonl", b'{"a": 1}\n7\n', "line 2 is a int; expected an object"),
        ("latin.json", b'[{"a": "\xff"}]', "not UTF-8 at byte 8"),
        ("utf16.jsonl", '{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
        ("number.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", "line 1 is not valid JSON"),
        ("deep.json", b"[" * 100_000, "not valid JSON"),
        ("cut.csv", b'a,b\n1,2\n3,"4', "not valid CSV"),
        ("twice.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999, mtime=0)[:40], "is it whole"),
        ("text.jsonl.gz", b"hello", "is it whole"),
        ("cut.parquet", b"PAR1", "is it whole"),
        ("utf32.jsonl", '{"a": 1}\n'.encode("utf-32"), "is UTF-32"),
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
        monkeypatch.setattr("data_prep.formats.rows.BLOCK", size)
        path.write_bytes(content + b"\n ")
        assert list(file_rows(path)) == rows
    for end in range(1, len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"list.json(: row \d is not valid JSON| is not UTF-8 at byte)"):
            list(file_rows(path))


def test_rows_that_cannot_be_decoded_are_counted_not_fatal(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n{"a": "y"}\n')
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n\xff,2\n1,2,3\n")
    assert [str(row) for row in file_rows(tmp_path / "a.jsonl")] == ["{'a': 'x'}", "not UTF-8", "{'a': 'y'}"]
    assert [str(row) for row in file_rows(tmp_path / "a.csv")][1:] == ["not UTF-8", "more fields than the header has columns"]


def test_an_empty_file_has_no_rows(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv"):
        (tmp_path / name).write_text("")
        assert list(file_rows(tmp_path / name)) == []


def test_a_folders_test_files_are_held_out(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "validation-00000.parquet", "testimonials.jsonl", "README.md"):
        (tmp_path / name).touch()
    training, held_out = ([path.name for path in files] for files in find_files(str(tmp_path)))
    assert (training, held_out) == (["testimonials.jsonl", "train.jsonl"], ["test.jsonl", "validation-00000.parquet"])
    for name in ("parts/train", "parts/test"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0000.jsonl").touch()
    training, held_out = ([path.name for path in files] for files in find_files(str(tmp_path / "parts")))
    assert (training, held_out) == (["0000.jsonl"], ["0000.jsonl"])
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "test.jsonl").touch()
    assert [[path.name for path in files] for files in find_files(str(tmp_path / "only"))] == [["test.jsonl"], []]


def test_a_source_that_is_not_there_says_what_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected a JSON"):
        find_files(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("hello")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(FileNotFoundError, match=r"pipe.jsonl is a pipe or a device; expected a JSON"):
        find_files(str(tmp_path / "pipe.jsonl"))
    (tmp_path / "pipe.jsonl").unlink()
    for place, seen in ((tmp_path, "holds notes.txt; expected"), (tmp_path / "notes.txt", "expected a JSON")):
        with pytest.raises(FileNotFoundError, match=seen):
            find_files(str(place))


@pytest.mark.slow
def test_a_hub_that_is_out_of_reach_is_one_message(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    arguments = ["--dataset", "alpaca", "--tokenizer", str(ROOT / "launch/quickstart/base"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "data_prep/prepare_sft.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "tatsu-lab/alpaca (train) cannot be loaded from the local cache, and the hub cannot be reached" in done.stderr
    assert "give the same rows with --source" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
