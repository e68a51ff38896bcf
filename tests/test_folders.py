"""What is read of a folder, a clone from the hub, a pattern or an address: which files, which splits, and what is said of the rest."""

import functools
import http.server
import json
import os
import threading

import datasets
import fsspec
import pytest
from bases import parquet

from data_prep.folders import Wanted, find_files
from data_prep.formats.rows import file_rows
from data_prep.prepare import prepare
from data_prep.splits import split_of

LINE = '{"text": "a"}\n'


def lay(folder, *names, **contents):
    """Write files with a row each, and files with contents of their own, which are named by what a double underscore makes a slash."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parquet(text=[name]) if name.endswith(".parquet") else LINE.encode())
    for name, content in contents.items():
        (folder / name.replace("__", "/").replace("_json", ".json").replace("README", "README.md")).write_text(content)
    return str(folder)


def names_in(folder, found):
    return [[os.path.relpath(file, folder) for file in files] for files in (found.training, found.held_out)]


SFT = Wanted("sft")
SPLITS = {
    "train.jsonl": "train",
    "training_set.csv": "train",
    "my-eval.jsonl": "test",
    "x_test.csv": "test",
    "Evaluation.JSONL": "test",
    "testing.parquet": "test",
    "valid.json": "validation",
    "dev2.jsonl": "validation",
    "data/val-00000-of-00001.parquet": "val",
    "rows.test.jsonl.zst": "test",
    "test/0000.jsonl": "test",
    "train/dev-questions.jsonl": "train",
    "my train set/a.csv": "train",
    "train_sft.jsonl": "train_sft",
    "data/code-00000-of-00002.parquet": "code",
    "data/all/train-00000-of-00009.parquet": "train",
    "latest.jsonl": None,
    "contest.jsonl": None,
    "testimonials.jsonl": None,
    "evaluations-by-gpt4.jsonl": None,
    "devices.jsonl": None,
    "a-00000-of-00002.jsonl": None,
}


def test_names_say_the_splits_that_they_say_to_the_datasets_library():
    assert {name: split_of(name) for name in SPLITS} == SPLITS


TAKEN = {
    "a user's folder": (["train.jsonl", "testimonials.jsonl", "test.jsonl", "validation-00000.parquet"], {}, 2, 2),
    "with nothing but a test": (["test.jsonl"], {}, 1, 0),
    "folders": (["parts/train/0.jsonl", "parts/test/0.jsonl"], {}, 1, 1),
    "a clone": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"dataset_infos_json": "{}"}, 2, 0),
    "what systems leave": (
        ["train.jsonl", "._train.jsonl", "__MACOSX/._train.jsonl", ".cache/x.json", "_SUCCESS", ".git/a.json"],
        {},
        1,
        0,
    ),
    "files without an end": (["rows", "LICENSE"], {}, 1, 0),
    "shards of any name": (["a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"], {}, 2, 0),
    "one split of a name of its own": (["data/code-00000-of-00001.parquet"], {}, 1, 0),
    "texts only": (["a.txt", "b.txt"], {}, 2, 0),
    "stems that are alike": (["a.jsonl", "a2.csv", "b/a.csv"], {}, 3, 0),
}


@pytest.mark.parametrize("case", TAKEN)
def test_the_files_of_a_folder(tmp_path, case):
    names, contents, training, held_out = TAKEN[case]
    found = find_files(lay(tmp_path, *names, **contents), SFT)
    assert [len(files) for files in names_in(tmp_path, found)] == [training, held_out]
    assert not any(name[0] == "_" or "/_" in name or "/." in name for files in names_in(tmp_path, found) for name in files)
    assert bool(found.held_out) == any("held out for validation, by their names" in note for note in found.notes)


H4 = [f"data/{role}_{family}-00000-of-00001.parquet" for role in ("train", "test") for family in ("sft", "gen", "prefs")]


def test_each_command_takes_its_splits_of_a_family_and_says_so(tmp_path):
    lay(tmp_path, *H4)
    for kind, family in (("sft", "sft"), ("dpo", "prefs")):
        found = find_files(str(tmp_path), Wanted(kind))
        assert names_in(tmp_path, found) == [[f"data/{role}_{family}-00000-of-00001.parquet"] for role in ("train", "test")]
        assert any(f"of its splits test_{family}, train_{family} taken" in note and "train_gen" in note for note in found.notes)
    found = find_files(str(tmp_path), Wanted("sft", split="train_gen"))
    assert names_in(tmp_path, found) == [["data/train_gen-00000-of-00001.parquet"], ["data/test_gen-00000-of-00001.parquet"]]
    found = find_files(str(tmp_path), Wanted("sft", split="all"))
    assert [len(files) for files in names_in(tmp_path, found)] == [6, 0]
    for name in H4:
        if "prefs" in name:
            (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="train_sft, .*none of which is for prepare_dpo: name those to train on with --split"):
        find_files(str(tmp_path), Wanted("dpo"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
REFUSED = {
    "a git-lfs pointer": (["a.jsonl"], {"train_json": POINTER}, "train.json is a git-lfs pointer.*git lfs pull"),
    "splits that may not belong together": (
        ["data/en-00000-of-00001.parquet", "data/fr-00000-of-00001.parquet"],
        {},
        "has the splits en, fr",
    ),
    "several that are held out": (["test.jsonl", "dev.jsonl"], {}, "has the splits validation, test, which may not belong together"),
    "two forms": (["rows.jsonl", "rows.parquet"], {}, "rows.jsonl and rows.parquet look like the same rows in two forms"),
    "two forms, one packed": (["rows.jsonl", "rows.jsonl.gz"], {}, "look like the same rows in two forms"),
    "two forms in a clone": (["train.jsonl", "data/train-00000-of-00001.parquet"], {}, "look like the same rows in two forms"),
    "no rows": (["notes.md", "model.safetensors"], {}, "holds .*notes.md.*; expected a JSON, JSONL, CSV"),
    "a prepared folder": (
        ["train/data-0.arrow"],
        {"manifest_json": "{}", "tokenizer__tokenizer_config_json": "{}"},
        "is a prepared folder",
    ),
    "a shard not downloaded": (
        ["data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"],
        {},
        "lacks data/train-00001-of-",
    ),
    "the only shard": (["train-00001-of-00002.jsonl"], {}, "lacks train-00000-of-00002.jsonl.*give those that are there by a pattern"),
    "a lost shard": ([], {"state_json": '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}'}, "lacks data-00000-of-00001.arrow"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_to_be_said_is_asked_for(tmp_path, case):
    names, contents, expected = REFUSED[case]
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
        find_files(lay(tmp_path, *names, **contents), SFT)
    assert str(tmp_path) in str(error.value)


def test_what_is_left_out_is_said(tmp_path):
    lay(tmp_path, "train.jsonl", "notes.txt", "_more.jsonl", "data/code-00000-of-00001.parquet")
    found = find_files(str(tmp_path), SFT)
    assert names_in(tmp_path, found) == [["train.jsonl"], []]
    told = "\n".join(found.notes)
    for name in ("rows.zip", "old.jsonl~", "rows.jsonl.lz4", "LICENSE", "card.md", "._old.jsonl.bak"):
        (tmp_path / name).write_bytes(b"x")
    assert [note for note in find_files(str(tmp_path), SFT).notes if "of no kind" in note] == [
        f"{tmp_path}: old.jsonl~, rows.jsonl.lz4, rows.zip not read: of no kind that is read"
    ]
    assert "splits train taken, code not" in told and "notes.txt not read" in told and "_more.jsonl not read" in told
    assert names_in(tmp_path, find_files(str(tmp_path), Wanted("sft", split="code,code")))[0] == ["data/code-00000-of-00001.parquet"]
    with pytest.raises(ValueError, match="--split ',' names no split"):
        find_files(str(tmp_path), Wanted("sft", split=","))
    with pytest.raises(ValueError, match=r"has no split 'cod'. Did you mean code\? It has (train, code|code, train)"):
        find_files(str(tmp_path), Wanted("sft", split="cod"))


def test_a_folder_of_save_to_disk_has_the_rows_that_were_saved(tmp_path):
    def texts(found):
        return [[row["text"] for file in files for row in file_rows(file)] for files in (found.training, found.held_out)]

    rows = datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(30)]})
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    rows.select(range(10)).save_to_disk(tmp_path / "one", num_shards=2)  # the three files of before stay
    for name in ("cache-0123456789abcdef.arrow", "cache-0123456789abcdef_00001_of_00002.arrow"):
        (tmp_path / "one" / name).write_bytes((tmp_path / "one" / "data-00000-of-00002.arrow").read_bytes())
    assert len(list((tmp_path / "one").glob("*.arrow"))) == 7
    assert texts(find_files(str(tmp_path / "one"), SFT)) == [rows["text"][:10], []]

    lay(tmp_path, "cache/alpaca-train.arrow", "cache/cache-0123456789abcdef.arrow", "cache/cache-of-mine.arrow")
    assert names_in(tmp_path, find_files(str(tmp_path / "cache"), SFT))[0] == ["cache/alpaca-train.arrow", "cache/cache-of-mine.arrow"]

    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "splits")
    assert texts(find_files(str(tmp_path / "splits"), SFT)) == [rows["text"][:], ["row 1"]]
    datasets.DatasetDict(chat=rows, code=rows.select([1])).save_to_disk(tmp_path / "parts")
    with pytest.raises(ValueError, match="has the splits chat, code, which may not belong together"):
        find_files(str(tmp_path / "parts"), SFT)
    assert texts(find_files(str(tmp_path / "parts"), Wanted("sft", split="code"))) == [["row 1"], []]


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.jsonl
  - split: test
    path: ["held/**"]
- config_name: extra
  data_files: more.jsonl
- config_name: gone
  data_files: absent/*.parquet
---
# Text
"""


def test_the_card_of_a_clone_says_which_files_are_which(tmp_path):
    lay(tmp_path, "data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl", "held/x/y.jsonl", "more.jsonl", "README.md")
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match="has the configs default, extra: name one with --config NAME"):
        find_files(str(tmp_path), SFT)
    with pytest.raises(ValueError, match=r"has no config 'xtra'. Did you mean extra\?"):
        find_files(str(tmp_path), Wanted("sft", config="xtra"))
    found = find_files(str(tmp_path), Wanted("sft", config="default"))
    assert names_in(tmp_path, found) == [["data/a.jsonl", "data/b.jsonl"], ["held/x/y.jsonl"]]
    assert any("data/deep/c.jsonl" in note and "which its card does not name" in note for note in found.notes)
    assert names_in(tmp_path, find_files(str(tmp_path), Wanted("sft", config="extra"))) == [["more.jsonl"], []]
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: only\n  data_dir: data\n---\n")
    assert names_in(tmp_path, find_files(str(tmp_path), SFT)) == [["data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"], []]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert len(find_files(str(tmp_path), SFT).training) == 5
    with pytest.raises(ValueError, match="has no config 'extra': neither a README.md that names it"):
        find_files(str(tmp_path), Wanted("sft", config="extra"))
    for files, expected in (("7", 4), ("{train: [more.jsonl, 3], test: 'held/**'}", 1)):  # of what is no pattern nothing is there
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n- extra\n- config_name: extra\n  data_files: {files}\n---\n")
        assert len(find_files(str(tmp_path), SFT).training) == expected + (files == "7")
    (tmp_path / "README.md").write_text("---\nconfigs: [a: b: c\n---\n")
    with pytest.raises(ValueError, match=r"README.md is not valid YAML \(.*: mend it, or name the files by a pattern"):
        find_files(str(tmp_path), SFT)


def test_configs_without_a_card_are_folders(tmp_path):
    lay(tmp_path, *(f"{config}/{split}/0000.jsonl" for config in ("en", "fr") for split in ("train", "test")))
    found = find_files(str(tmp_path), SFT)
    assert [len(files) for files in names_in(tmp_path, found)] == [2, 2]
    assert any("the rows of its folders en, fr are taken together; --config NAME takes one" in note for note in found.notes)
    found = find_files(str(tmp_path), Wanted("sft", config="fr"))
    assert names_in(tmp_path, found) == [["fr/train/0000.jsonl"], ["fr/test/0000.jsonl"]]
    assert not any("together" in note for note in found.notes)


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path):
    lay(tmp_path, "train.jsonl")
    (tmp_path / "more.jsonl.gz").symlink_to(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="more.jsonl.gz is a link that leads nowhere"):
        find_files(str(tmp_path), SFT)
    with pytest.raises(FileNotFoundError, match="more.jsonl.gz is a link that leads nowhere"):
        find_files(f"{tmp_path}/more.jsonl.gz", SFT)
    with pytest.raises(FileNotFoundError, match="more.jsonl.gz is a link that leads nowhere"):
        find_files(f"{tmp_path}/*", SFT)


def test_a_folder_of_the_hubs_cache_is_its_newest_snapshot(tmp_path):
    cache = tmp_path / "datasets--me--rows"
    lay(cache, "snapshots/old/rows.jsonl", "snapshots/new/rows.jsonl", "refs/main")
    (cache / "refs" / "main").write_text("new")
    assert names_in(cache, find_files(str(cache), SFT)) == [["snapshots/new/rows.jsonl"], []]


def test_a_pattern_names_several_files(tmp_path):
    lay(tmp_path, "a.jsonl", "b.jsonl", "test.jsonl", "in/c.jsonl", "x.md")
    assert names_in(tmp_path, find_files(f"{tmp_path}/*.jsonl", SFT)) == [["a.jsonl", "b.jsonl"], ["test.jsonl"]]
    assert len(find_files(f"{tmp_path}/**/*.jsonl", SFT).training) == 3
    (tmp_path / "d[1].jsonl").write_text(LINE)
    assert len(find_files(f"{tmp_path}/d[1].jsonl", SFT).training) == 1
    with pytest.raises(FileNotFoundError, match=r"/\*.csv fits no file; expected a JSON"):
        find_files(f"{tmp_path}/*.csv", SFT)


def test_rows_at_an_address_are_those_of_the_file():
    system = fsspec.filesystem("memory")
    for name, content in {
        "rows/train.jsonl.gz": LINE.encode(), "rows/my-test.jsonl": LINE.encode(), "rows/a.parquet": parquet(text=["p"])
    }.items():  # fmt: skip
        with fsspec.open(f"memory://{name}", "wb", compression="gzip" if name.endswith(".gz") else None) as file:
            file.write(content)
    try:
        found = find_files("memory://rows", SFT)
        assert [str(file) for file in found.training] == ["memory:///rows/a.parquet", "memory:///rows/train.jsonl.gz"]
        assert [file.name for file in found.held_out] == ["my-test.jsonl"]
        assert [row["text"] for file in found.training for row in file_rows(file)] == ["p", "a"]
        before = found.held_out[0].facts()
        system.pipe("/rows/my-test.jsonl", LINE.encode() * 2)
        assert found.held_out[0].facts() != before
        assert len(find_files("memory://rows/*.parquet", SFT).training) == 1
        with pytest.raises(FileNotFoundError, match="memory://rows/none.jsonl does not exist"):
            find_files("memory://rows/none.jsonl", SFT)
    finally:
        system.rm("/rows", recursive=True)


def test_rows_on_a_server_are_read_and_its_errors_told(tiny, tmp_path):
    lay(tmp_path, "rows.jsonl")
    (tmp_path / "long.jsonl").write_text(LINE.replace("a", "a" * 999) * 9000)  # more than what fsspec reads at a time
    (tmp_path / "long.parquet").write_bytes(parquet(text=[os.urandom(2**23)]))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        (file,) = find_files(f"{here}/rows.jsonl?key=secret", SFT).training
        assert list(file_rows(file)) == [json.loads(LINE)]
        assert str(file) == f"{here}/rows.jsonl" and file.name == "rows.jsonl"
        assert sum(len(row) for row in file_rows(find_files(f"{here}/long.jsonl", SFT).training[0])) == 9000
        with pytest.raises(
            ValueError, match="long.parquet cannot be read to its end .*range requests"
        ):  # of which this server knows nothing
            list(file_rows(find_files(f"{here}/long.parquet", SFT).training[0]))
        place = f"{here}/rows.jsonl?key=secret:2"
        prepare("sft", ["--dataset", place, "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out", "--val_size", "0"])
        manifest = (tmp_path / "out" / "manifest.json").read_text()
        assert "secret" not in manifest
        assert json.loads(manifest)["options"]["dataset"] == [f"{here}/rows.jsonl:2"] and json.loads(manifest)["counts"]["train"] == 2
        assert file.facts()["size"] == str(len(LINE))
        with pytest.raises(ValueError, match=r"/none.jsonl cannot be read \(FileNotFoundError: .*is the address right"):
            find_files(f"{here}/none.jsonl", SFT)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match="/rows.jsonl cannot be read"):
        list(file_rows(file))


def test_an_address_that_needs_a_package_names_it():
    for address, package in (("s3://bucket/rows.jsonl", "s3fs"), ("gs://bucket/rows.jsonl", "gcsfs")):
        with pytest.raises(ValueError, match=f"{address} needs a package that is not installed .*{package}"):
            find_files(address, SFT)
    for page, there in (
        ("https://huggingface.co/datasets/me/rows", "hf://datasets/me/rows"),
        ("https://huggingface.co/datasets/me/rows/viewer/default/train?p=1", "hf://datasets/me/rows"),
        ("https://huggingface.co/datasets/me/rows/blob/main/data/a.jsonl", "hf://datasets/me/rows@main/data/a.jsonl"),
    ):
        with pytest.raises(ValueError, match=f"is a page about a dataset: give {there}$"):
            find_files(page, SFT)
    with pytest.raises(ValueError, match=r"x1y://a/rows.jsonl: Protocol not known.*; expected one that fsspec knows"):
        find_files("x1y://a/rows.jsonl", SFT)
