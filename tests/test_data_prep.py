"""Preparation: whole or not at all, the same bytes every time, every row accounted for."""

import gc
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import warm

from data_prep import blocks, convert
from data_prep import prepare as prepare_module
from data_prep.options import look, parse
from data_prep.prepare import prepare
from data_prep.preview import parse as parse_preview
from data_prep.show import show
from posttrain.common import files
from posttrain.data.parts import IGNORE
from posttrain.data.prepared import load_prepared

ROOT = Path(__file__).resolve().parents[1]
USER, ASSISTANT, SYSTEM = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("system", "s")))


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(kind: str, tiny, tmp_path, rows: list[dict], *more: str) -> dict:
    """Prepare rows and return the manifest."""
    source = write(tmp_path / "rows.jsonl", rows)
    defaults = ["--max_dropped", "1"] if "--max_dropped" not in more else []
    defaults += ["--val_size", "0"] if "--val_size" not in more else []
    prepare(kind, ["--source", source, "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out", *defaults, *more])
    show(parse_preview([f"{tmp_path}/out", "--check"]))
    return json.loads((tmp_path / "out" / "manifest.json").read_text())


def rows_of(tmp_path, kind: str = "sft", split: str = "train") -> list[dict]:
    table = getattr(load_prepared(str(tmp_path / "out"), kind, ""), split)
    return list(table) if len(table) else []


def questions(count: int, answer: str = "ke") -> list[dict]:
    return [{"prompt": f"ta {number}", "response": f"{answer} {number}"} for number in range(count)]


def folder_hash(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_refused_row_is_counted_under_its_cause(tiny, tmp_path):
    rows = [{"prompt": "ta", "response": "ke"}, {"prompt": "ta", "response": " "}, {"prompt": "ta", "response": "ke " * 300}]
    rows += [{"prompt": "ta", "response": None}, {"prompt": "ta"}, {"prompt": "ta", "response": "ke"}]
    manifest = run("sft", tiny, tmp_path, rows, "--max_length", "100")
    assert manifest["counts"] == {"train": 1, "validation": 0}
    assert manifest["rows"] == 6
    assert {cause: entry["rows"] for cause, entry in manifest["ledger"].items()} == {
        "response is empty": 1,
        "longer than --max_length 100": 1,
        "response is null": 1,
        "its columns are of no known shape: prompt": 1,
        "an exact copy of another row": 1,
    }
    assert manifest["ledger"]["response is empty"]["first"] == "rows.jsonl:1"
    lost = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [row["source"] for row in lost] == [f"rows.jsonl:{number}" for number in (1, 2, 3, 4, 5)]


def test_too_many_lost_rows_are_refused_with_their_causes(tiny, tmp_path):
    rows = [*questions(8), {"prompt": "ta", "response": ""}, {"prompt": "ta", "response": None}]
    with pytest.raises(ValueError, match=r"2 of 10 rows \(20.0%\) cannot be used, more than --max_dropped 0.1") as error:
        run("sft", tiny, tmp_path, rows, "--max_dropped", "0.1")
    assert "1: response is empty (first: rows.jsonl:8)" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert run("sft", tiny, tmp_path, rows, "--max_dropped", "0.2")["counts"]["train"] == 8


def test_copies_are_what_was_asked_for_and_never_refused(tiny, tmp_path):
    """Exact copies are no damage: a source of nothing else passes --max_dropped."""
    rows = [{"prompt": "ta", "response": "ke"}] * 10
    manifest = run("sft", tiny, tmp_path, rows, "--max_dropped", "0")
    assert manifest["counts"]["train"] == 1
    assert manifest["ledger"] == {"an exact copy of another row": {"rows": 9, "first": "rows.jsonl:1", "unusable": False}}


def test_a_system_prompt_fills_in_where_there_is_none(tiny, tmp_path):
    long = {"role": "assistant", "content": "ke " * 300}
    rows = [{"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}, {"messages": [USER, long]}]
    manifest = run("sft", tiny, tmp_path, rows, "--system_prompt", "ta", "--max_length", "100")
    texts = [tiny.tokenizer.decode(row["input_ids"]) for row in rows_of(tmp_path)]
    assert texts[0].startswith("<|im_start|>system\ns<|im_end|>")
    assert texts[1].startswith("<|im_start|>system\nta<|im_end|>")
    assert manifest["changes"] == {"given --system_prompt": 1}


def test_a_system_prompt_has_no_place_in_documents(tiny, tmp_path):
    with pytest.raises(ValueError, match="no place in plain documents"):
        run("sft", tiny, tmp_path, [{"text": "ta ke"}], "--system_prompt", "ta")


def test_validation_shares_no_prompt_with_training(tiny, tmp_path):
    rows = [{"prompt": f"ta {number % 10}", "response": f"ke {number}"} for number in range(40)]
    run("sft", tiny, tmp_path, rows, "--val_size", "9")
    splits = [rows_of(tmp_path, split=name) for name in ("train", "validation")]
    assert [len(split) for split in splits] == [32, 8]
    numbers = [{int(row["source"].split(":")[1]) % 10 for row in split} for split in splits]
    assert not numbers[0] & numbers[1]


def test_a_conversation_and_its_continuation_are_on_the_same_side(tiny, tmp_path):
    starts = [[{"role": "user", "content": f"ta {number}"}, {"role": "assistant", "content": f"ke {number}"}] for number in range(10)]
    more = [{"role": "user", "content": "lo"}, {"role": "assistant", "content": "ni"}]
    run("sft", tiny, tmp_path, [{"messages": start + rest} for start in starts for rest in ([], more)], "--val_size", "6")
    train, validation = (rows_of(tmp_path, split=name) for name in ("train", "validation"))
    assert len(validation) == 6
    assert not any(other["input_ids"][: len(row["input_ids"])] == row["input_ids"] for row in validation for other in train)


def test_a_validation_smaller_than_asked_for_is_noted(tiny, tmp_path):
    manifest = run("sft", tiny, tmp_path, [{"prompt": "ta", "response": f"ke {number}"} for number in range(30)], "--val_size", "5")
    assert manifest["counts"]["validation"] == 0
    assert manifest["notes"] == ["--val_size 5 was asked for, 0 rows are there: rows that begin with the same message stay together"]


def test_the_upstreams_own_test_rows_are_the_validation_rows(tiny, tmp_path):
    write(tmp_path / "in" / "train.jsonl", questions(20))
    write(tmp_path / "in" / "test.jsonl", [*questions(2), {"prompt": "lo", "response": "ni"}])
    prepare("sft", ["--source", f"{tmp_path}/in", "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out"])
    assert {row["source"].split(":")[0] for row in rows_of(tmp_path, split="validation")} == {"in/held out"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 18, "validation": 3}
    assert manifest["ledger"]["its prompt is in the validation split"]["rows"] == 2


def test_a_validation_as_large_as_the_data_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="--val_size 5 leaves nothing of 5 rows"):
        run("sft", tiny, tmp_path, questions(5), "--val_size", "5")


def test_a_cut_answer_loses_its_end_token(tiny, tmp_path):
    long, short = {"prompt": "ta", "response": "ke lo " * 30}, {"prompt": "ta", "response": "ke"}
    manifest = run("sft", tiny, tmp_path, [long, short], "--max_length", "40", "--too_long", "cut")
    cut, whole = rows_of(tmp_path)
    assert len(cut["input_ids"]) == 40
    assert cut["labels"][-1] == cut["input_ids"][-1] != tiny.chat.end_id
    assert tiny.chat.end_id in whole["labels"]
    assert manifest["changes"] == {"cut to --max_length": 1}


def test_a_cut_that_leaves_only_the_question_is_dropped(tiny, tmp_path):
    rows = [{"prompt": "ta " * 60, "response": "ke"}, {"prompt": "ta", "response": "ke"}]
    manifest = run("sft", tiny, tmp_path, rows, "--max_length", "40", "--too_long", "cut")
    assert manifest["ledger"]["nothing trained is left within --max_length"]["rows"] == 1


def test_pairs_are_cut_on_the_same_prompt(tiny, tmp_path):
    same = "ke " * 30
    rows = [
        {"prompt": "ta", "chosen": "ke " * 30, "rejected": "lo"},
        {"prompt": "ta", "chosen": same + "lo", "rejected": same + "ni"},
        {"prompt": "ta " * 40, "chosen": "ke", "rejected": "lo"},
    ]
    manifest = run("dpo", tiny, tmp_path, rows, "--max_length", "30", "--too_long", "cut")
    (row,) = rows_of(tmp_path, "dpo")
    assert len(row["prompt"]) + len(row["chosen"]) == 30
    assert row["chosen"][-1] != tiny.chat.end_id == row["rejected"][-1]
    assert {cause for cause, entry in manifest["ledger"].items() if entry["rows"] == 1} == {
        "chosen equals rejected once cut",
        "the prompt alone fills --max_length 30",
    }


def test_a_long_conversation_is_split_at_its_turns(tiny, tmp_path):
    turns = [{"role": role, "content": f"{text} {number}"} for number in range(6) for role, text in (("user", "ta"), ("assistant", "ke"))]
    manifest = run("sft", tiny, tmp_path, [{"messages": [SYSTEM, *turns]}], "--max_length", "60", "--too_long", "split_turns")
    rows = rows_of(tmp_path)
    assert len(rows) > 1
    assert all(len(row["input_ids"]) <= 60 for row in rows)
    assert all(tiny.tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n") for row in rows)
    said = "".join(tiny.tokenizer.decode([t for t in row["labels"] if t != IGNORE]) for row in rows)
    assert said == "".join(f"ke {number}<|im_end|>" for number in range(6))
    assert manifest["changes"] == {"split at turns": 1}


def test_refused_rows_do_not_keep_their_chunk_in_memory(tiny):
    """Memory stays flat while the garbage collector is off: no cycle through the refusal's traceback."""
    from data_prep.examples import SFT, Settings
    from data_prep.shapes.messages import Chat

    calls = [{"function": {"name": "f", "arguments": {}}}]
    chats = [Chat([USER, {"role": "assistant", "content": "", "tool_calls": calls}]) for _ in range(200)]
    gc.collect()
    gc.disable()
    try:
        chunk = convert.parts_of_rows(SFT(tiny.chat, Settings(100)), enumerate(chats))
        assert "tool calls need" in str(chunk.items[0])
        del chunk
        assert gc.collect() < 20
    finally:
        gc.enable()


def test_an_exchange_that_does_not_fit_is_dropped_and_counted(tiny, tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": "ke " * 90}]}, {"messages": [USER, ASSISTANT]}]
    manifest = run("sft", tiny, tmp_path, rows, "--max_length", "60", "--too_long", "split_turns")
    assert manifest["ledger"]["one exchange is longer than --max_length 60"]["rows"] == 1
    with pytest.raises(ValueError, match="split_turns is for conversations"):
        run("dpo", tiny, tmp_path / "pairs", [{"prompt": "q", "chosen": "a", "rejected": "b"}], "--too_long", "split_turns")


def test_near_copies_are_found(tiny, tmp_path):
    long = " ".join(f"ta{number}" for number in range(60))
    rows = [{"prompt": long, "response": "ke"}, {"prompt": long + " lo", "response": "ke"}, {"prompt": "ta", "response": "ke lo ni"}]
    manifest = run("sft", tiny, tmp_path, rows, "--duplicates", "near")
    assert manifest["ledger"]["a near copy of another row"]["rows"] == 1
    assert [row["source"] for row in rows_of(tmp_path)] == ["rows.jsonl:0", "rows.jsonl:2"]


def test_rows_of_signs_only_are_not_near_copies(tiny, tmp_path):
    rows = [{"prompt": a, "response": b} for a, b in (("🙂", "👍"), ("🔥", "💧"), ("?", "!"))]
    assert run("sft", tiny, tmp_path, rows, "--duplicates", "near")["counts"]["train"] == 3


def test_a_row_of_several_pieces_is_lost_once(tiny, tmp_path):
    quote = "one two three four five six"
    benchmark = write(tmp_path / "arc.jsonl", [{"question": quote}])
    turns = [{"role": role, "content": quote + " ta" * 9} for _ in range(6) for role in ("user", "assistant")]
    rows = [{"messages": turns}, {"messages": [USER, ASSISTANT]}]
    manifest = run("sft", tiny, tmp_path, rows, "--max_length", "150", "--too_long", "split_turns", "--decontaminate", benchmark)
    assert manifest["ledger"]["quotes a row of arc.jsonl"]["rows"] == 1


def test_copies_are_kept_on_request(tiny, tmp_path):
    assert run("sft", tiny, tmp_path, [{"prompt": "ta", "response": "ke"}] * 4, "--duplicates", "keep")["counts"]["train"] == 4


def test_rows_that_quote_a_benchmark_are_dropped(tiny, tmp_path):
    quote = "which of these things is a good reason for the seasons to change on earth"
    benchmark = write(tmp_path / "arc.jsonl", [{"question": {"stem": quote}, "answer": "A"}, {"question": {"stem": "too short"}}])
    rows = [*questions(3), {"prompt": f"Tell me, {quote.upper()}?", "response": "ke"}, {"prompt": quote[:30], "response": "too short"}]
    manifest = run("sft", tiny, tmp_path, rows, "--decontaminate", benchmark)
    assert manifest["ledger"]["quotes a row of arc.jsonl"]["rows"] == 1
    assert manifest["counts"]["train"] == 4
    with pytest.raises(ValueError, match="no row holds a text of 5 words"):
        run("sft", tiny, tmp_path / "b", questions(3), "--decontaminate", write(tmp_path / "short.jsonl", [{"a": "b"}]))


def test_several_sources_with_weights(tiny, tmp_path):
    a, b, c = (write(tmp_path / f"{name}.jsonl", questions(20, name)) for name in ("ka", "ki", "ko"))
    arguments = ["--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out", "--val_size", "0"]
    prepare("sft", ["--dataset", f"{a}:0.25", "--dataset", b, "--dataset", f"{c}:1.5", *arguments])
    counts = {name: sum(row["source"].startswith(name) for row in rows_of(tmp_path)) for name in ("ka", "ki", "ko")}
    assert counts == {"ka": 5, "ki": 20, "ko": 30}
    assert len({row["source"] for row in rows_of(tmp_path) if row["source"].startswith("ko")}) == 20


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--dataset", "alpacca"],
            r"--dataset alpacca: no such file. Did you mean alpaca\? Short names of datasets of the hub: alpaca, alpaca_cleaned",
        ),
        (["--dataset", "ultrafeedback"], "it is a dataset for the other command, python .*prepare_dpo.py"),
        (
            ["--dataset", "trl-lib/Capybara"],
            "give --dataset data/Capybara:\n    hf download --repo-type dataset trl-lib/Cap",
        ),
        (["--dataset", "alpaca:-1"], "the weight should be above 0"),
        (["--source", "nowhere"], "nowhere does not exist"),
        (["--source", "rows.jsonl", "--revision", "main"], "--revision names a version of a hub dataset"),
        (["--dataset", "rows.jsonl", "--dataset", "rows.jsonl"], "two sources are called rows.jsonl"),
        (["--source", "rows.jsonl", "--decontaminate", "nowhere"], "nowhere does not exist"),
        (["--source", "rows.jsonl", "--tokenizer", "nowhere.model"], "nowhere.model does not exist"),
        (["--source", "rows.jsonl", "--template", "tokenizer"], "no chat template of its own"),
    ],
)
def test_mistakes_are_named(tiny, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", questions(3))
    bare = tmp_path / "bare"
    tiny.tokenizer.save_pretrained(bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises((ValueError, OSError), match=expected):
        prepare("sft", ["--tokenizer", str(bare), "--output_dir", "out", *arguments])
    assert not (tmp_path / "out").exists()


def test_no_models_tokenizer_is_taken_in_silence(tiny, tmp_path, monkeypatch, capsys):
    """Without --tokenizer that of the shipped recipe's model is taken where the model is there, and named; else it is asked for."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", questions(3))
    with pytest.raises(ValueError, match="Name the model to train: --tokenizer FOLDER_OR_HUB_NAME"):
        prepare("sft", ["--source", "rows.jsonl", "--output_dir", "out"])
    shutil.copytree(tiny.base, "checkpoints/qwen3_1.8b")
    prepare("sft", ["--source", "rows.jsonl", "--output_dir", "out"])
    assert "taking that of checkpoints/qwen3_1.8b, the model of the recipe sft_qwen3_1.8b" in capsys.readouterr().out


def test_an_output_folder_is_never_overwritten(tiny, tmp_path):
    run("sft", tiny, tmp_path, questions(3))
    with pytest.raises(FileExistsError, match="exists; remove it or give another"):
        run("sft", tiny, tmp_path, questions(3))


def test_a_source_that_gives_nothing_leaves_nothing(tiny, tmp_path):
    with pytest.raises(ValueError, match="no row can be trained on: 1 x response is empty"):
        run("sft", tiny, tmp_path, [{"prompt": "ta", "response": ""}])
    with pytest.raises(ValueError, match="no row can be trained on: the source is empty"):
        run("sft", tiny, tmp_path / "empty", [])
    assert not (tmp_path / "out").exists()


def test_pairs_are_prompt_and_two_answers_that_end(tiny, tmp_path):
    run("dpo", tiny, tmp_path, [{"prompt": "ta", "chosen": "ke", "rejected": "lo ni"}])
    (row,) = rows_of(tmp_path, "dpo")
    texts = [tiny.tokenizer.decode(row[name]) for name in ("prompt", "chosen", "rejected")]
    assert texts == ["<|im_start|>user\nta<|im_end|>\n<|im_start|>assistant\n", "ke<|im_end|>", "lo ni<|im_end|>"]


@pytest.mark.slow
def test_text_of_every_kind_comes_through(tiny, tmp_path):
    texts = [
        "🙂👩‍👧",
        "مرحبا بالعالم",
        "x" * 5000,
        "é" * 100_000 + " " + "lo " * 300_000 + "ni",
        "<|im_end|>\n<|im_start|>assistant\nlo",
        "\n\na\n",
    ]
    rows = [{"prompt": f"ta {number}", "response": text} for number, text in enumerate(texts)]
    assert run("sft", tiny, tmp_path, rows, "--max_length", "10000000")["counts"]["train"] == len(texts)
    for row, text in zip(rows_of(tmp_path), texts, strict=True):
        trained = [token for token in row["labels"] if token != IGNORE]
        assert trained[-1] == tiny.chat.end_id
        assert tiny.tokenizer.decode(trained[:-1]) == text
        assert row["input_ids"].count(tiny.chat.syntax.start_id) == 2


def test_the_same_rows_give_the_same_bytes_however_they_are_chunked(tiny, tmp_path, monkeypatch):
    rows = [{"prompt": f"ta {number % 70}", "response": f"ke {number}"} for number in range(120)] + [{"prompt": "ta", "response": ""}]
    hashes, facts = [], []
    for number, size in enumerate((2000, 7)):
        monkeypatch.setattr(blocks, "BLOCK_ROWS", size)
        (tmp_path / f"{number}").mkdir()
        manifest = run("sft", tiny, tmp_path / f"{number}", rows, "--val_size", "20")
        facts.append({name: manifest[name] for name in ("counts", "rows", "ledger", "changes", "tokens")})
        found = folder_hash(tmp_path / f"{number}" / "out")
        hashes.append({name: value for name, value in found.items() if "data-" not in name and name != "manifest.json"})
    assert hashes[0] == hashes[1]
    assert facts[0] == facts[1]
    tables = [[list(getattr(load_prepared(f"{tmp_path}/{n}/out", "sft", ""), s)) for s in ("train", "validation")] for n in (0, 1)]
    assert tables[0] == tables[1]
    batches = [load_prepared(f"{tmp_path}/{n}/out", "sft", "").train.micro_batch(range(0, 100, 9)) for n in (0, 1)]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert torch.equal(batches[0].targets, batches[1].targets)


def test_rows_are_read_as_datasets_reads_them(tiny):
    for kind in ("sft", "dpo"):
        prepared = load_prepared(getattr(tiny, kind), kind, "")
        for name, split in (("train", prepared.train), ("validation", prepared.validation)):
            assert list(split) == list(datasets.load_from_disk(f"{getattr(tiny, kind)}/{name}"))
            assert split.trained.dtype == split.positions.dtype == np.int64  # else the fingerprint would differ from that of earlier runs


@pytest.mark.parametrize(
    "text", ["[]", '{"_data_files": [3]}', '{"_data_files": []}', "\x00", '{"_data_files": [{"filename": "state.json"}]}']
)
def test_a_damaged_description_of_the_rows_is_named(tiny, tmp_path, text):
    shutil.copytree(tiny.sft, tmp_path / "data")
    (tmp_path / "data" / "train" / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"is damaged .*Make it again with"):
        load_prepared(str(tmp_path / "data"), "sft", "THE COMMAND")


def test_nothing_is_left_of_a_file_that_could_not_be_written_whole(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError, match="full"), files.written_whole(tmp_path / "x") as file:
        file.write(b"half")
        raise OSError("full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_killed_while_removing_its_work_it_starts_over(tiny, tmp_path, monkeypatch):
    """Half a staging folder is never taken for a whole one."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 10)
    source = write(tmp_path / "rows.jsonl", questions(50))
    arguments = ["--source", source, "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out", "--val_size", "0"]
    rmtree = shutil.rmtree

    def killed(folder: Path, **more) -> None:
        if not (folder / "0.000001.arrow").exists():
            return rmtree(folder, **more)
        (folder / "0.000001.arrow").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("data_prep.staging.shutil.rmtree", killed)
        prepare("sft", arguments)
    assert (tmp_path / "out.incomplete").is_dir()
    rmtree(tmp_path / "out")
    prepare("sft", arguments)
    assert len(rows_of(tmp_path)) == 50


@pytest.fixture
def half_done(tiny, tmp_path, monkeypatch) -> list[str]:
    """A command line that is refused once all rows are encoded, in three chunks, and then goes on with them."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 10)
    source = write(tmp_path / "rows.jsonl", [*questions(20), *[{"prompt": "ta", "response": None}] * 10])
    arguments = ["--source", source, "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out", "--val_size", "0"]
    with pytest.raises(ValueError, match="cannot be used"):
        prepare("sft", arguments)
    return [*arguments, "--max_dropped", "1"]


@pytest.mark.parametrize("how", ["a bit", "cut", "empty", "absent", "a pipe", "facts"])
def test_a_chunk_that_was_damaged_is_encoded_again(half_done, tmp_path, capsys, how):
    """The chunks of a killed preparation have lain on a disk, and what is prepared from them is proven no more."""
    chunk = tmp_path / "out.incomplete" / "chunks" / "0.000001.arrow"
    content = bytearray(chunk.read_bytes())
    if how == "a bit":
        with pa.memory_map(str(chunk)) as file:
            row = pa.ipc.open_file(file).read_all().column("input_ids")[3].values.to_numpy()
        content[content.find(row.tobytes()) + 8] ^= 1  # of a token's id
    if how in ("absent", "a pipe"):
        chunk.unlink()
    if how == "a pipe":
        os.mkfifo(chunk)
    elif how == "facts":
        chunk.with_suffix(".json").write_text("[" * 200_000)
    elif how != "absent":
        chunk.write_bytes({"a bit": content, "cut": content[:-100], "empty": b""}[how])
    capsys.readouterr()
    prepare("sft", half_done)
    assert re.search(rf"{chunk.parent}/0.000001.*: its rows, and those after them, are encoded again\n", capsys.readouterr().out)
    undamaged = rows_of(tmp_path)
    shutil.rmtree(tmp_path / "out")
    prepare("sft", half_done)
    assert rows_of(tmp_path) == undamaged
    assert len(undamaged) == 20


def test_a_folder_that_is_not_preparations_is_not_removed(half_done, tmp_path):
    staging = tmp_path / "out.incomplete"
    (staging / "request.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=f"{staging}/request.json:1 is not UTF-8.*remove {staging}, and the same command starts over"):
        prepare("sft", half_done)
    (staging / "request.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=f"{staging}/request.json is damaged: .*remove {staging}"):
        prepare("sft", half_done)
    shutil.rmtree(staging)
    staging.write_text("mine")
    with pytest.raises(ValueError, match=f"{staging} is no folder"):
        prepare("sft", half_done)
    staging.unlink()
    staging.mkdir()
    (staging / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{staging} holds .'thesis.txt'., which are not preparation's"):
        prepare("sft", half_done)
    assert [path.name for path in staging.iterdir()] == ["thesis.txt"]
    (staging / "thesis.txt").unlink()
    prepare("sft", half_done)
    assert not staging.exists()


def test_a_link_in_the_outputs_place_is_refused_before_the_rows_are_encoded(half_done, tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="out is a link that leads nowhere; remove it or give another --output_dir"):
        look("sft", parse("sft", half_done))


def test_two_preparations_of_one_folder_do_not_meet(half_done, tmp_path, monkeypatch):
    """The second one began by removing the first one's work, or published it half done."""
    first, told = prepare_module.convert, []

    def with_another(*arguments) -> None:
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=f"{tmp_path}/out is in use by another process") as error:
            patched.setattr(prepare_module, "convert", first)
            prepare("sft", [*half_done, "--max_length", "100"])
        told.append(error.value)
        first(*arguments)

    monkeypatch.setattr(prepare_module, "convert", with_another)
    prepare("sft", half_done)
    assert len(told) == 1
    assert len(rows_of(tmp_path)) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_a_damaged_row_does_not_pass_the_check(tiny, tmp_path, capsys):
    run("sft", tiny, tmp_path, questions(5))
    (path,) = (tmp_path / "out" / "train").glob("*.arrow")
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    rows = table.to_pylist()
    rows[3]["input_ids"][-3] = rows[3]["labels"][-3] = rows[2]["input_ids"][-3]  # of the same length, so that only the content tells
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, table.schema))
    with pytest.raises(ValueError, match="2 failures in 5 rows") as error:
        show(parse_preview([f"{tmp_path}/out", "--check"]))
    assert "data-00000-of-00001.arrow is not the file that was prepared" in str(error.value)
    assert "train 3 (rows.jsonl:3): its trained tokens do not read as the text that they were made from" in str(error.value)


def test_the_preview_shows_what_is_trained(tiny, tmp_path, capsys):
    run("sft", tiny, tmp_path, [{"prompt": "ta <b>", "response": "ke <i>"}])
    show(parse_preview([f"{tmp_path}/out"]))
    assert "rows.jsonl:0" in (shown := capsys.readouterr().out)
    assert "<|im_start|>assistant\n\u27e6ke <i><|im_end|>\u27e7" in shown  # no colours in a file
    show(parse_preview([f"{tmp_path}/out", "--html", f"{tmp_path}/page.html", "--ids"]))
    page = (tmp_path / "page.html").read_text()
    assert '<span class="t">ke &lt;i&gt;</span>' in page
    assert "<i>" not in page
    with pytest.raises(ValueError, match="--row 1: .* has the train rows 0 to 0"):
        show(parse_preview([f"{tmp_path}/out", "--row", "1"]))


def test_the_preview_of_a_pair_shows_both_answers(tiny, tmp_path, capsys):
    run("dpo", tiny, tmp_path, [{"prompt": "ta", "chosen": "ke", "rejected": "lo ni"}])
    show(parse_preview([f"{tmp_path}/out"]))
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("chosen", "rejected", "ke<|im_end|>", "lo ni<|im_end|>"))


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(tiny, tmp_path):
    """10 times SIGKILL at a random moment: after each the folder is absent or whole, and the last run's bytes are an undisturbed one's."""
    words = np.random.RandomState(0).randint(0, 60, (12_000, 40))
    rows = [{"prompt": " ".join(tiny.words[w] for w in line[:8]), "response": " ".join(tiny.words[w] for w in line[8:])} for line in words]
    source = write(tmp_path / "rows.jsonl", rows)

    def prepare_into(name: str) -> warm.Started:
        return warm.start("data_prep/prepare_sft.py", "--source", source, "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/{name}")

    started = time.monotonic()
    assert prepare_into("undisturbed").wait() == 0
    whole = time.monotonic() - started
    draw, killed, finished_early = random.Random(1), 0, 0
    while killed < 10:
        assert finished_early < 40, "it always ends before it is killed"
        started = time.monotonic()
        process = prepare_into("killed")
        try:
            assert process.wait(timeout=whole * draw.uniform(0.05, 1.0)) == 0
            finished_early += 1
            whole = time.monotonic() - started  # the machine had more to do before
            assert (tmp_path / "killed" / "manifest.json").is_file()
            assert folder_hash(tmp_path / "killed") == folder_hash(tmp_path / "undisturbed")
            (tmp_path / "killed").rename(tmp_path / f"done{finished_early}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            assert not (tmp_path / "killed").exists() or (tmp_path / "killed" / "manifest.json").is_file()
            if (tmp_path / "killed").exists():
                (tmp_path / "killed").rename(tmp_path / f"late{killed}")
    if not (tmp_path / "killed").exists():
        assert prepare_into("killed").wait() == 0
    assert folder_hash(tmp_path / "killed") == folder_hash(tmp_path / "undisturbed")
    assert not (tmp_path / "killed.incomplete").exists()
