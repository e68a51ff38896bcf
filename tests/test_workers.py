"""Preparation in several processes: the same bytes whatever their number, the first error in order, and no process left behind."""

import contextlib
import csv
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from test_data_prep import folder_hash
from test_templates import byte_level

from data_prep import blocks
from data_prep import prepare as prepare_module
from data_prep.prepare import prepare
from data_prep.sources import Source
from data_prep.workers import beside, work_on
from posttrain.data import faster

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [
    {"prompt": f"what is {number}?", "response": f"the fox {number} says </s>\n\n  {'once more ' * (number % 9)}"} for number in range(60)
]


def _of_this_process() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.fixture
def children():
    """A function that gives the processes which this one has started since the test began."""
    others = _of_this_process()
    return lambda: _of_this_process() - others


def write(folder: Path, form: str) -> Path:
    """Write PAIRS, and some rows that cannot be used, as a file."""
    path, texts = folder / f"rows.{form}", [json.dumps(row) for row in PAIRS]
    if form == "jsonl":
        lines = [*texts[:5], '{"other": 1}', "", " \t", *texts[5:20], '{"prompt": "a", "prompt": "b"}', *texts[20:]]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(texts).encode()))
    elif form == "json":
        path.write_text(f"[{','.join(texts)}]")
    elif form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(PAIRS)
    else:
        table = pa.Table.from_pylist([*PAIRS, {"prompt": None, "response": "a"}])
        pyarrow.parquet.write_table(table, path, row_group_size=23)
    return path


@pytest.mark.parametrize(
    ("form", "tokenizer"), [("jsonl", "tiny"), *((form, "byte_level") for form in ("jsonl", "jsonl.gz", "json", "csv", "parquet"))]
)
def test_the_bytes_do_not_depend_on_the_number_of_workers(tiny, tmp_path, monkeypatch, children, form, tokenizer):
    """Nor on how many rows a block has, what is counted and said of them included; byte_level is encoded by fastokens."""
    monkeypatch.setattr(prepare_module, "SMALL", 0)
    source, base = write(tmp_path, form), tiny.base
    if tokenizer == "byte_level":
        base = str(tmp_path / "base")
        byte_level(True).save_pretrained(base)
    said = []
    for name, rows, workers in (("one", 7, 1), ("three", 7, 3), ("whole", 2000, 3)):
        monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
        arguments = ["--source", str(source), "--tokenizer", base, "--output_dir", f"{tmp_path}/{name}", "--workers", str(workers)]
        prepare("sft", [*arguments, "--val_size", "9", "--max_dropped", "1", "--too_long", "cut", "--max_length", "60"])
        said.append(json.loads((tmp_path / name / "manifest.json").read_text()))
        assert not children()
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "three")
    assert said[0]["rows"] == len(PAIRS) + {"jsonl": 3, "parquet": 1}.get(form, 0)
    for name in ("counts", "ledger", "changes", "tokens", "notes", "encoder"):
        assert said[0][name] == said[2][name]
    if tokenizer == "byte_level" and faster.fastokens:
        assert said[0]["encoder"].startswith("fastokens ")


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_blocks_are_the_rows_of_the_file_from_any_row_on(tmp_path, monkeypatch, form):
    """A killed preparation goes on where a block ended; the rows and their numbers are those of reading all."""
    (tmp_path / "more").mkdir()
    source = Source("rows", files=(write(tmp_path, form), write(tmp_path / "more", form)))

    def read(start: int, most: int | None) -> list:
        return [(number, str(item)) for block in blocks.blocks("sft", source, start, most) for number, item in block.read("sft", source)]

    whole = read(0, None)
    assert [number for number, _ in whole] == list(range(len(whole)))
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 7)
    assert read(0, None) == whole
    sizes = [block.count for block in blocks.blocks("sft", source, 0, None)]
    ends = list(itertools.accumulate(sizes))
    assert max(sizes) == 7
    assert [block.count for block in blocks.blocks("sft", source, ends[2], None)] == sizes[3:]
    for start, most in ((ends[4], None), (5, 31), (0, 1), (ends[1], ends[1]), (64, 90), (3, 10_000)):
        assert read(start, most) == whole[start:most]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_first_wrong_line_is_named_whoever_reads_it(tiny, tmp_path, monkeypatch, children, workers):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 5)
    lines = [json.dumps(row) for row in PAIRS]
    lines[32], lines[51] = "{", "]"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    arguments = ["--source", f"{tmp_path}/rows.jsonl", "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out", "--workers", workers]
    with pytest.raises(ValueError, match="rows.jsonl: line 33 is not valid JSON"):
        prepare("sft", arguments)
    assert not children()
    lines[32], lines[51] = lines[0], lines[1]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    prepare("sft", arguments)


def test_results_come_with_a_bounded_number_of_pieces_in_flight(children):
    taken, found = [], []

    def pieces():
        for piece in range(40):
            taken.append(piece)
            yield piece

    for result in work_on(pieces(), lambda number, piece: (number, piece * piece), 3):
        found.append(result)
        assert len(taken) - len(found) <= 4
    assert sorted(found) == [(number, number**2) for number in range(40)]
    assert not children()


def test_what_goes_wrong_first_is_raised_whichever_comes_first(children):
    def work(number: int, piece: int) -> int:
        if number in (4, 6):
            time.sleep(0.2 if number == 4 else 0)
            raise ValueError(f"piece {number}")
        return piece

    def pieces():
        yield from range(8)
        raise OSError("the file ends")

    with pytest.raises(ValueError, match="piece 4"):
        list(work_on(pieces(), work, 3))
    with pytest.raises(OSError, match="the file ends"):
        list(work_on(pieces(), lambda number, piece: piece, 3))
    with pytest.raises(ZeroDivisionError) as error:  # a fault of the code says where it is
        list(work_on(range(9), lambda number, piece: number // (number - 5), 3))
    assert "test_workers.py" in error.value.__notes__[0]
    assert not children()


def test_a_worker_that_was_killed_is_one_clear_line(children):
    def work(number: int, piece: int) -> int:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return piece

    done = []
    with pytest.raises(ValueError, match=r"a worker of preparation \(process \d+\) was killed by SIGKILL, .* goes on from here"):
        done.extend(work_on(range(50), work, 3))
    assert not children()


def test_an_interrupt_leaves_no_process(tmp_path, children):
    def work(number: int, piece: int) -> None:
        if piece:
            time.sleep(5)
            (tmp_path / "was waited for").touch()

    with pytest.raises(KeyboardInterrupt), contextlib.closing(work_on(range(50), work, 3)) as results:
        next(results)
        assert len(children()) == 3
        raise KeyboardInterrupt
    assert not children()
    with pytest.raises(ZeroDivisionError), beside(lambda: work(0, 1), 2):
        assert len(children()) == 1
        raise ZeroDivisionError
    assert not children()
    assert not list(tmp_path.iterdir())


def test_workers_die_with_a_parent_that_is_killed():
    code = """
import os, time
from data_prep.workers import work_on
def work(number, piece):
    if number < 3:
        return os.getpid()
    time.sleep(600)
for process in work_on(range(9), work, 3):
    print(process, flush=True)
"""
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=path) as parent:
        assert parent.stdout
        workers = {int(parent.stdout.readline()) for _ in range(3)}
        parent.kill()
    until = time.monotonic() + 20
    while alive := [one for one in workers if Path(f"/proc/{one}/stat").exists() and _state(one) != "Z"]:
        assert time.monotonic() < until, alive
        time.sleep(0.05)


def _state(process: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"
