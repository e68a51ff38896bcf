"""What --dataset and --source name: datasets of the hub and places of one's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from data_prep.catalogue import HUBS
from data_prep.folders import find_files
from data_prep.options import look, parse
from data_prep.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]


def test_a_source_that_is_not_there_says_what_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected a JSON"):
        find_files(str(tmp_path / "nowhere"))
    (tmp_path / "notes.md").write_text("hello")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(FileNotFoundError, match=r"pipe.jsonl is a pipe or a device; expected a JSON"):
        find_files(str(tmp_path / "pipe.jsonl"))
    (tmp_path / "pipe.jsonl").unlink()
    for place, seen in (
        (tmp_path, "holds notes.md; expected"),
        (tmp_path / "notes.md", "of no known kind; write its rows as JSONL"),
    ):
        with pytest.raises(FileNotFoundError, match=seen):
            find_files(str(place))


def sources(tmp_path, *arguments: str, kind: str = "sft"):
    """What a command line names, found as the command does."""
    return look(kind, parse(kind, [*arguments, "--tokenizer", "t", "--output_dir", f"{tmp_path}/out"]))


def lay(folder: Path, **rows: list[dict]) -> None:
    """Write JSONL files, named by what a double underscore makes a slash."""
    for name, several in rows.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in several))


ROW = {"text": "ta"}


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("kind", HUBS)
def test_the_datasets_with_short_names_are_told(kind, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        parse(kind, ["--list"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert max(map(len, told.splitlines())) <= columns
    words = told.split()
    for short, hub in HUBS[kind].items():
        assert short in words and hub.name in words and hub.rows in told and hub.licence.split()[0] in told, short
        assert hub.config is None or f"config {hub.config}" in " ".join(words)
    assert not HUBS["sft"].keys() & HUBS["dpo"].keys()


def test_a_short_name_is_its_dataset_its_splits_and_its_config(tmp_path):
    training, held_out = sources(tmp_path, "--dataset", "smoltalk:0.5", "--dataset", "smoltalk2")
    assert [(one.hub.name, one.hub.config, one.split, one.weight) for one in [*training, *held_out]] == [
        ("HuggingFaceTB/smoltalk", "all", "train", 0.5),
        ("HuggingFaceTB/smoltalk2", "SFT", "all", 1),
        ("HuggingFaceTB/smoltalk", "all", "test", 1),
    ]
    training, held_out = sources(tmp_path, "--dataset", "smoltalk2", "--config", "Mid", "--split", "a,b")
    assert [(one.hub.config, one.split) for one in training] == [("Mid", "a+b")] and held_out == []
    seen = {json.dumps(source.identity) for source in training}
    for other in (["--config", "SFT"], ["--config", "Mid"], ["--split", "a"], ["--revision", "x"]):
        seen.add(json.dumps(sources(tmp_path, "--dataset", "smoltalk2", *other).training[0].identity))
    assert len(seen) == 5


def test_a_clone_of_a_dataset_with_a_short_name_has_its_config(tmp_path):
    lay(tmp_path, data__a=[ROW], demographics__b=[ROW])
    configs = "- config_name: default\n  data_files: data/*\n- config_name: demographics\n  data_files: demographics/*\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (source,) = sources(tmp_path, "--dataset", "aya", "--source", str(tmp_path)).training
    assert (source.label, [file.name for file in source.files]) == ("aya", ["a.jsonl"])
    with pytest.raises(ValueError, match="has the configs default, demographics"):
        sources(tmp_path, "--source", str(tmp_path))
    (source,) = sources(tmp_path, "--dataset", "aya", "--source", str(tmp_path), "--config", "demographics").training
    assert [file.name for file in source.files] == ["b.jsonl"]
    lay(tmp_path, stack__data__rl__c=[ROW], stack__data__reward__d=[ROW])
    (source,) = sources(tmp_path, "--dataset", "stack_paired", "--source", f"{tmp_path}/stack", kind="dpo").training
    assert [file.name for file in source.files] == ["c.jsonl"]


def test_an_option_that_would_change_nothing_or_several_datasets_is_refused(tmp_path):
    lay(tmp_path, a=[ROW], b=[ROW])
    a, b = f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"
    for arguments, expected in (
        (["--source", a, "--split", "train"], "is a file: --config and --split choose in a folder"),
        (["--dataset", a, "--dataset", b, "--split", "train"], "choose in one dataset, and several are given"),
        (["--source", a, "--txt", "file"], "--txt says what is a row of a .txt file, and there is none"),
        (["--source", a, "--revision", "x"], "no row comes from the hub"),
        (["--dataset", "smoltalk3"], "no such file. Did you mean smoltalk"),
        (["--dataset", "nectar"], "it is a dataset for the other command"),
    ):
        with pytest.raises(ValueError, match=expected):
            sources(tmp_path, *arguments)


def test_another_file_of_a_source_or_another_content_is_another_source(tmp_path):
    """By this a killed preparation goes on, or starts over."""
    lay(tmp_path, in__a=[ROW], in__b=[ROW])

    def identity(*more: str) -> str:
        return json.dumps(sources(tmp_path, "--dataset", f"{tmp_path}/in/*", *more).training[0].identity)

    seen = [identity()]
    assert identity() == seen[0]
    lay(tmp_path, in__b=[ROW, ROW])
    seen.append(identity())
    lay(tmp_path, in__c=[ROW])
    seen.append(identity())
    (tmp_path / "in" / "c.jsonl").rename(tmp_path / "in" / "d.txt")
    (tmp_path / "in" / "a.jsonl").unlink()
    (tmp_path / "in" / "b.jsonl").unlink()
    seen += [identity(), identity("--txt", "file")]
    assert len(set(seen)) == 5


def test_what_was_decided_for_the_user_is_noted_and_the_held_out_split_is_validation(tiny, tmp_path):
    lay(tmp_path, in__train_sft=[{"prompt": f"ta {number}", "response": "ke"} for number in range(5)])
    lay(tmp_path, in__test_sft=[{"prompt": "ka", "response": "ke"}], in__train_gen=[{"prompt": "no", "response": "no"}])
    prepare("sft", ["--dataset", f"{tmp_path}/in", "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 5, "validation": 1} and manifest["rows"] == 6
    told = "\n".join(manifest["notes"])
    assert "of its splits test_sft, train_sft taken, train_gen not" in told
    assert "held out for validation, by their names: test_sft.jsonl" in told


def test_rows_at_an_address_are_prepared_and_known_again(tiny, tmp_path):
    with fsspec.open("memory://made/rows.jsonl", "w") as file:
        file.write('{"prompt": "ta", "response": "ke"}\n{"prompt": "ka", "response": "ke"}\n')
    try:
        place = "memory://made/rows.jsonl:2"
        (source,) = sources(tmp_path, "--dataset", place).training
        assert source.label == "rows.jsonl" and json.loads(json.dumps(source.identity)) == json.loads(json.dumps(source.identity))
        prepare("sft", ["--dataset", place, "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out", "--val_size", "0"])
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["counts"]["train"] == 4 and manifest["sources"] == ["rows.jsonl"]
    finally:
        fsspec.filesystem("memory").rm("/made", recursive=True)


def test_a_text_is_trained_as_it_was_split(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("ta ke\nta ka\n\nno\n")
    for name, more, rows in (("lines", [], 3), ("paragraphs", ["--txt", "paragraph"], 2), ("whole", ["--txt", "file"], 1)):
        arguments = ["--source", f"{tmp_path}/a.txt", "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/{name}", "--val_size", "0"]
        prepare("sft", [*arguments, *more])
        assert json.loads((tmp_path / name / "manifest.json").read_text())["counts"]["train"] == rows


def test_a_dataset_of_the_datasets_library_gives_its_rows(tmp_path):
    """The hub's reader, on a folder, which load_dataset takes in the place of a name: several splits, and objects that differ."""
    lay(tmp_path, in__code=[{"a": {"x": 1}}, {"a": {"y": None}}], in__chat=[{"a": {"y": "z"}}])
    (tmp_path / "in" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - {split: code, path: code.jsonl}\n  - {split: chat, path: chat.jsonl}\n"
        "- config_name: two\n  data_files: chat.jsonl\n---\n"
    )
    code = f"""
from data_prep.catalogue import Hub
from data_prep.formats.hub import hub_rows
print([list(hub_rows(Hub({str(tmp_path / "in")!r}, "all", config=config), "all", None)) for config in ("one", "two")])
try:
    list(hub_rows(Hub({str(tmp_path / "in")!r}, "all", config="three"), "all", None))
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    rows, error = done.stdout.splitlines()[:2]
    assert rows == "[[{'a': {'x': 1}}, {'a': {'y': None}}, {'a': {'y': 'z'}}], [{'a': {'y': 'z'}}]]"
    assert "(three, all) cannot be loaded" in error and "'one', 'two'" in error


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
