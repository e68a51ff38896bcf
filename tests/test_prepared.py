"""Prepared data that is damaged, or whose rows contradict themselves, is refused by name."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from posttrain.data.prepared import fingerprint_file, load_prepared, memory_mapped
from posttrain.data.row_checks import check_rows
from posttrain.training import reference


@pytest.mark.parametrize("damage", ["manifest", "half_manifest", "kind", "format", "arrow", "a_bit", "state", "rows", "template"])
def test_damaged_data_is_refused(tiny, tmp_path, damage):
    folder = tmp_path / "data"
    shutil.copytree(tiny.sft, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]  # else only that would be noticed
    if damage == "manifest":
        (folder / "manifest.json").unlink()
    elif damage == "half_manifest":
        (folder / "manifest.json").write_text(json.dumps(manifest)[:40])
    elif damage == "arrow":
        file = next((folder / "train").glob("*.arrow"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "a_bit":  # of a token's id: of the same size, and a table as before
        file = next((folder / "train").glob("*.arrow"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 2
        file.write_bytes(content)
    elif damage == "state":
        (folder / "train" / "state.json").write_text("{}")
    else:
        changes = {"rows": {"counts": {"train": 99, "validation": 7}}, "kind": {"kind": "dpo"}, "format": {"format": 0}}
        (folder / "manifest.json").write_text(json.dumps(manifest | (changes | {"template": {"template_name": "x"}})[damage]))
    with pytest.raises(ValueError, match=str(folder)) as error:
        load_prepared(str(folder), "sft", "THE COMMAND")
    again = f"--source {tiny.folder}/sft.jsonl --tokenizer {tiny.base} --template chatml --output_dir {folder}_again"
    assert ("THE COMMAND" if damage in ("manifest", "half_manifest", "kind", "format") else again) in str(error.value)
    assert damage != "state" or f"{folder}/train/state.json names no files" in str(error.value)


@pytest.mark.parametrize("what", ["a table elsewhere", "a pipe", "a table less", "nothing"])
def test_no_table_is_read_but_those_that_the_manifest_records(tiny, tmp_path, what):
    """state.json has no checksum: it decided which rows were trained."""
    folder = Path(shutil.copytree(tiny.sft, tmp_path / "data"))
    recorded = next((folder / "train").glob("*.arrow")).name
    other = shutil.copytree(tiny.sft, tmp_path / "other") / "train" / recorded
    os.mkfifo(folder / "train" / "pipe.arrow")
    named = {"a table elsewhere": [f"../../other/train/{recorded}"], "a pipe": ["pipe.arrow"], "a table less": [], "nothing": [recorded]}
    (folder / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in named[what]]}))
    if what == "nothing":
        assert load_prepared(str(folder), "sft", "").train.table.equals(memory_mapped([other]))
        return
    with pytest.raises(ValueError, match=f"{folder}/train/state.json names (no files|.*not the files that manifest.json records)"):
        load_prepared(str(folder), "sft", "")


def test_a_link_out_of_prepared_data_is_refused(tiny, tmp_path):
    """A run of DPO writes into DATA/reference/. A table on another disk is the one that was prepared, by its checksum."""
    folder = Path(shutil.copytree(tiny.dpo, tmp_path / "data"))
    (table,) = (folder / "train").glob("*.arrow")
    table.symlink_to(table.rename(tmp_path / "elsewhere.arrow"))
    load_prepared(str(folder), "dpo", "")
    (tmp_path / "mine").mkdir()
    (folder / "reference").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=f"{folder}/reference is a link to {tmp_path}/mine, outside of {folder}"):
        load_prepared(str(folder), "dpo", "")


def test_log_probs_that_unpack_to_far_more_are_not_read(tmp_path):
    path, sums = tmp_path / "train.npz", np.ones((7, 2, 2))
    reference._write(path, sums)
    assert (reference._load(path, 7) == sums).all()
    np.savez_compressed(path, sums=np.zeros((2**20, 2, 2)))
    assert path.stat().st_size < 2**16
    tracemalloc.start()
    assert reference._load(path, 7) is None
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


LIES = [
    ("sft", {"num_trained": lambda row: 10**6}, r"train is damaged: row 3 trains \d+ tokens, and its num_trained says 1000000"),
    ("sft", {"input_ids": lambda row: [], "labels": lambda row: []}, "row 3 has no tokens in input_ids"),
    ("sft", {"labels": lambda row: row["labels"][:-1]}, "row 3 has another number of labels than of tokens"),
    ("sft", {"labels": lambda row: [7] * len(row["labels"])}, "row 3 has labels that are not its tokens"),
    ("sft", {"input_ids": lambda row: [*row["input_ids"][:-1], 10**6]}, "row 3 has the token id 1000000 in input_ids; the tokenizer has "),
    ("dpo", {"rejected": lambda row: [*row["rejected"], -5]}, "row 3 has the token id -5 in rejected"),
    ("dpo", {"prompt": lambda row: []}, "row 3 has no tokens in prompt"),
]


@pytest.mark.parametrize(("kind", "lie", "expected"), LIES)
def test_rows_that_contradict_themselves_are_refused(tiny, tmp_path, kind, lie, expected):
    """A stranger's folder, whose checksums are those of what it holds: such rows would train nothing, other words, or for ever."""
    folder = Path(shutil.copytree(getattr(tiny, kind), tmp_path / "data"))
    file = next((folder / "train").glob("*.arrow"))
    table = memory_mapped([file])
    rows = table.to_pylist()
    rows[3] |= {name: change(rows[3]) for name, change in lie.items()}
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows, table.schema), max_chunksize=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][f"train/{file.name}"] = fingerprint_file(file)
    del manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = load_prepared(str(folder), kind, "")
    with pytest.raises(ValueError, match=expected):
        check_rows(data, str(folder), len(tiny.tokenizer))
    check_rows(load_prepared(getattr(tiny, kind), kind, ""), "", len(tiny.tokenizer))
