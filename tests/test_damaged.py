"""Damaged files of a run: every command that reads them names the file, and the line, and a log's damage does not stop a run."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, start_run

from posttrain.common import files, terminal
from posttrain.common.errors import is_mistake
from posttrain.data.manifest import read_manifest
from posttrain.engine import checkpoint_folder
from posttrain.engine.ds_config import read_ds_config
from posttrain.evaluation import tasks
from posttrain.model.forms import newest
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe, load_recipe_of
from posttrain.run import report, stored
from posttrain.run.card import model_card
from posttrain.run.directory import Run
from posttrain.run.resume import already_finished, resolve

VALUES = {"checkpoint_path": "b", "sft_data_dir": "d", "max_iters": 9, "global_batch_size": 1}
METRICS = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-5}


def recipe_of(run: Path) -> SFTRecipe:
    return build_recipe(SFTRecipe, VALUES | {"out_dir": str(run)}, {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of four steps, as the package writes it, with something in each of its logs."""
    run = tmp_path_factory.mktemp("damaged") / "run"
    here = Run(recipe_of(run), 0, {"data": "1", "model": "2"})
    start_run(here, 1, 9)
    for step in range(5):
        split = "train" if step else "eval"
        here.log(step, split, METRICS | {"runtime": 1.0} if step == 0 else METRICS)
        here.log_samples(step, [{"prompt": "p", "answer": f"it’s {step}", "tokens": 2, "stopped": True}])
    here.bad_batch(2, "spike", METRICS, [])
    here._append("health.jsonl", {"step": 3, "name": "n", "what": "w", "todo": "t"})
    here.finished()
    here.close()
    (run / "final").mkdir()
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def replaced(name: str, value):
    """Damage a value of run.json, as a version without checksums might have written it."""
    return lambda content: json.dumps({key: one for key, one in json.loads(content).items() if key != "checksum"} | {name: value}).encode()


EVERY_FORM = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: min(99, len(content) // 2)],
    "zeros": lambda content: bytes(len(content)),
    "a list": lambda content: b"[1, 2]",
    "a number": lambda content: b"5",
    "a high bit": lambda content: content[:9] + bytes([content[9] | 128]) + content[10:],
    "Latin-1": lambda content: content + "# ö".encode("latin-1"),
    "nested": lambda content: b"[" * 600,
    "gone": None,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nowhere": lambda path: path.symlink_to("gone"),
    "a link to itself": lambda path: path.symlink_to(path),
}
OTHERS = ("a pipe", "a folder", "a link to nowhere", "a link to itself")  # what stands in the file's place
OF_RUN_JSON = {
    "total_steps": replaced("total_steps", "x"),
    "total_steps, huge": replaced("total_steps", 10**400),
    "starts": replaced("starts", [{"ranks": 1}]),
    "ended": replaced("ended", "yesterday"),
    "kind": replaced("kind", 3),
}
OF_RECIPE = {
    "tags": lambda content: b"out_dir: !!python/object/apply:os.system [ls]",
    "a table": lambda content: b"out_dir: {a: 1}",
    "a text for a number": lambda content: b"global_batch_size: x",
    "numbers as keys": lambda content: b"1: 2",
}


def damaged(path: Path, how: str) -> None:
    change = (EVERY_FORM | OF_RUN_JSON | OF_RECIPE)[how]
    if how in OTHERS or not change:
        path.unlink()
        if change:
            change(path)
        return
    path.write_bytes(change(path.read_bytes()))


def told(action, *arguments) -> str:
    """The message with which an action is refused, as a user's mistake."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        action(*arguments)
    assert is_mistake(error.value), repr(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


def of_report(run: Path) -> None:
    report.read_runs([run])


@pytest.mark.parametrize("how", [*EVERY_FORM, *OF_RUN_JSON])
def test_a_damaged_run_json_is_named_by_all_who_read_it(run, how):
    damaged(run / "run.json", how)
    readers = [of_report, lambda run: newest(str(run)), lambda run: resolve(recipe_of(run), 1)]
    if how == "gone":  # then it is no run
        readers = [of_report]
    elif how not in OF_RUN_JSON:
        readers += [
            lambda run: Run(recipe_of(run), 0, {}),
            lambda run: already_finished(recipe_of(run), 0),
            lambda run: model_card(run, VALUES, {}),
        ]
    for reader in readers:
        message = told(reader, run)
        assert str(run) in message
        assert "run.json" in message
        if how in OF_RUN_JSON:
            assert how.split(",")[0] in message
    if how != "gone":
        assert "Restore it from a copy" in message


@pytest.mark.parametrize("how", [*EVERY_FORM, *OF_RECIPE])
def test_a_damaged_recipe_yaml_is_named_by_all_who_read_it(run, how):
    (run / "checkpoints" / "step_000004").mkdir(parents=True)
    damaged(run / "recipe.yaml", how)
    for reader in (of_report, lambda run: newest(str(run)), lambda run: resolve(recipe_of(run), 1)):
        message = told(reader, run)
        assert str(run / "recipe.yaml") in message
        assert "Restore it from a copy" in message


LINES = {
    "no JSON": b'{"step": 2, "spl',
    "a number": b"5",
    "not UTF-8": b'{"step": 2, "split": "train", "lo\xf3s": 1.0}',
    "zeros": bytes(20),
    "no step": b"{}",
    "a step that is a text": b'{"step": "2", "split": "train", "samples": [], "name": "n", "what": "w", "todo": "t"}',
    "empty": b"",
    "nested": b"[" * 2000,
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "health.jsonl"])
@pytest.mark.parametrize("how", LINES)
def test_a_damaged_line_of_a_log_is_named(run, name, how):
    path = run / name
    first, *others = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, LINES[how], *others, b'{"step": 9, "sp']))  # the end was cut by a crash
    message = told(report.read_runs, [run])
    assert f"{path}:2 is damaged: " in message or f"{path}:2 is not UTF-8" in message


@pytest.mark.parametrize(
    ("name", "value"), [("warmup_iters", 3), ("total_steps", 1), ("kind", "dpo"), ("inputs", {"data": "2", "model": "2"})]
)
def test_a_value_of_run_json_that_was_changed_is_seen(run, name, value):
    """A right one of its kind, which would make another curve or refuse the run's own data."""
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert f"{path} is damaged: it is not what was written" in told(of_report, run)


def test_a_value_of_recipe_yaml_that_was_changed_is_seen(run):
    """The comment with the checksum may go: then the file is one of an older version."""
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("global_batch_size: 1", "global_batch_size: 3"))
    assert f"{path} is damaged: it is not what was written" in told(of_report, run)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("#")))
    assert stored.read_recipe(run)["global_batch_size"] == 3


@pytest.mark.parametrize("how", OTHERS)
def test_what_stands_in_a_logs_place_is_named_before_the_run_goes_on(run, how):
    damaged(run / "metrics.jsonl", how)
    for reader in (of_report, lambda run: stored.cut_log(run, "metrics.jsonl", 4)):
        assert f"{run}/metrics.jsonl is " in told(reader, run)


@pytest.mark.parametrize("name", ["metrics.jsonl.damaged", ".lock", "logs/rank_0.log", "logs", "checkpoints", "model", ""])
def test_what_a_run_cannot_write_to_is_named_before_anything_is_loaded(run, name):
    path = run / name if name else run
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    for make, what in ((os.mkfifo, "a pipe|not a folder"), (lambda path: path.symlink_to("gone"), "leads nowhere|not a folder")):
        if what.startswith("leads") and name not in ("", "logs", "checkpoints", "model"):
            continue
        make(path)
        said = told(resolve, recipe_of(run), 1)
        assert str(path) in said and re.search(what, said), said
        path.unlink()
    if name.endswith(".damaged"):
        os.mkfifo(path)
        (run / "metrics.jsonl").write_text("no line\n")
        assert str(path) in told(stored.cut_log, run, "metrics.jsonl", 4)


def sparse(path: Path, begin: bytes = b"") -> Path:
    """Write a file that claims 60 GB, and has next to nothing on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(60 * 10**9)
    return path


def test_files_that_claim_any_size_are_refused_at_once(run, tmp_path):
    data, prompts, step = tmp_path / "data", sparse(tmp_path / "prompts.txt"), run / "checkpoints" / "step_000002"
    begun = time.monotonic()
    for path, reader in (
        (sparse(tmp_path / "ds.json"), lambda: read_ds_config(str(tmp_path / "ds.json"))),
        (sparse(tmp_path / "recipe.yaml"), lambda: load_recipe_of("sft", [str(tmp_path / "recipe.yaml")])),
        (prompts, lambda: files.read_prompts(prompts)),
        (sparse(data / "manifest.json"), lambda: read_manifest(str(data), "MAKE")),
        (sparse(run / "run.json"), lambda: stored.read_facts(run)),
        (sparse(run / "samples.jsonl", (run / "samples.jsonl").read_bytes()), lambda: stored.read_log(run, "samples.jsonl")),
        (sparse(run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes()), lambda: stored.cut_log(run, "metrics.jsonl", 4)),
    ):
        assert path.name in told(reader)
    sparse(step / "manifest.json")
    assert "manifest.json is not readable" in told(checkpoint_folder.read_manifest, step)
    (tmp_path / "recipe.yaml").write_bytes(b"\n" * 10**8)
    assert "has 100,000,000 bytes, and should have at most" in told(load_recipe_of, "sft", [str(tmp_path / "recipe.yaml")])
    assert time.monotonic() - begun < 20


def test_a_byte_order_mark_is_no_damage(run):
    for path in (*run.glob("*.jsonl"), run / "run.json", run / "recipe.yaml"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (found,) = report.read_runs([run])
    assert len(found.records) == 5
    assert stored.cut_log(run, "metrics.jsonl", 4) == []


def test_a_key_that_is_twice_in_a_file_is_refused(run):
    """JSON and YAML would keep the last without a word."""
    for name, content in (("run.json", b'{"kind": "sft", "kind": "dpo"}'), ("recipe.yaml", b"out_dir: a\nout_dir: b\n")):
        (run / name).write_bytes(content)
        read = {"run.json": stored.read_facts, "recipe.yaml": stored.read_recipe}[name]
        assert f"{run / name} is damaged: {content.split()[0].strip(b'{:').decode().strip(chr(34) + ':')} is set twice" in told(read, run)


def test_damaged_lines_of_logs_are_set_aside_once_and_the_run_goes_on(run, capsys, monkeypatch):
    """Byte for byte, and nothing else of before the start is lost; a last line without a line end is dropped without a word."""
    monkeypatch.setattr(terminal, "console", terminal._Terminal(highlight=False, soft_wrap=True))  # another test may have ended the old one
    before = {path: path.read_bytes().splitlines() for path in run.glob("*.jsonl")}
    assert len(before) == 4
    for path, (first, *others) in before.items():
        path.write_bytes(b"\n".join([first, *LINES.values(), *others, b'{"step": 9, "sp']))
    for _ in range(2):
        here = Run(recipe_of(run), 0, {"data": "1", "model": "2"})
        start_run(here, 4, 9)
        here.close()
    said = capsys.readouterr().out
    for path, lines in before.items():
        kept = [line for line in lines if json.loads(line)["step"] < 4]
        assert path.read_bytes().splitlines()[: len(kept)] == kept
        assert path.with_name(f"{path.name}.damaged").read_bytes() == b"".join(line + b"\n" for line in LINES.values())
        numbers = ", ".join(str(2 + number) for number in range(len(LINES)))
        assert said.count(f"warning  lines {numbers} of {path} cannot be read: moved to {path.name}.damaged") == 1
    report.read_runs([run])


def test_the_runs_recipe_follows_what_moved_and_keeps_what_is_nowhere(run, tmp_path):
    """A tokenizer that is no longer named is no longer kept; a path under which no model lies does not take the place of the old one."""
    was = files.read_object(run / "recipe.yaml")
    files.write_whole(run / "recipe.yaml", yaml.safe_dump(was | {"tokenizer": "old"}))
    (tmp_path / "data").mkdir()
    (run / ".creating").touch()  # as a start that was killed at the end of its creation leaves it
    now = {"checkpoint_path": str(tmp_path / "nowhere"), "sft_data_dir": str(tmp_path / "data"), "tokenizer": None}
    here = Run(recipe_of(run).model_copy(update=now), 0, {"data": "1", "model": "2"})
    start_run(here, 5, 9)
    here.close()
    found = files.read_object(run / "recipe.yaml")
    assert {name: found[name] for name in now} == now | {"checkpoint_path": was["checkpoint_path"]}
    assert not (run / ".creating").exists()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", {"step": 2, "split": "other"}),
        ("metrics.jsonl", {"step": 2, "split": "train", "loss": 1.0}),
        ("metrics.jsonl", {"step": 2, "split": "train", "loss": "low"}),
        ("metrics.jsonl", {"step": 10**400, "split": "train"}),
        ("metrics.jsonl", {"step": 2, "split": "train", "loss": 10**400}),
        ("samples.jsonl", {"step": 2, "samples": [{"prompt": "p"}]}),
        ("health.jsonl", {"step": 2, "name": "n"}),
    ],
)
def test_a_line_of_other_values_is_named_by_the_report(run, name, line):
    with (run / name).open("a") as file:
        file.write(json.dumps(line) + "\n")
    number = len((run / name).read_text().splitlines())
    assert f"{run / name}:{number} is damaged: " in told(of_report, run)


def test_other_files_are_named_as_well(run, tmp_path):
    (run / "data.json").write_text("[]")
    assert f"{run}/data.json is damaged" in told(of_report, run)
    (tmp_path / "data").mkdir()
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("# Größe\nmax_iters: 1\n".encode("latin-1"))
    assert f"{latin}:1 is not UTF-8 text" in told(load_recipe_of, "sft", [str(latin)])
    assert f"{latin}:1 is not UTF-8 text" in told(read_ds_config, str(latin))
    for how in ("empty", "cut", "a high bit", "a number", "a pipe", "nested"):
        for path, reader in (
            (tmp_path / "data" / "manifest.json", lambda: read_manifest(str(tmp_path / "data"), "MAKE")),
            (
                run / "checkpoints" / "step_000002" / "manifest.json",
                lambda: checkpoint_folder.read_manifest(run / "checkpoints" / "step_000002"),
            ),
        ):
            path.unlink(missing_ok=True)
            path.write_text('{"format": 2, "kind": "sft", "checksum": "0"}')
            damaged(path, how)
            assert "manifest.json" in told(reader)


@pytest.mark.parametrize("results", [b"", b"{}", b'{"a": {"b": {"value": "x", "low": 1, "high": 2}}}', b'{"a": "\xff"}', b"[" * 2000])
def test_a_damaged_file_of_results_is_named(tmp_path, results):
    (tmp_path / "results.json").write_bytes(results)
    assert f"--results {tmp_path}/results.json is not a file of results" in told(report.read_results, tmp_path / "results.json")


ARC = {"query": "q", "choices": ["a", "b"], "gold": 1}
GSM8K = {"question": "q", "answer": "1"}


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("arc_easy", b"", "it is no JSON object"),
        ("arc_easy", b"[1]", "it is no JSON object"),
        ("arc_easy", b'{"query": "\xff"}', "is not UTF-8 text"),
        ("arc_easy", {"query": "q", "gold": 1}, "it lacks the column 'choices'"),
        ("arc_easy", ARC | {"gold": 2}, ""),
        ("arc_easy", ARC | {"query": 5}, ""),
        ("arc_easy", ARC | {"choices": ["a", 2]}, "a choice is no text"),
        ("arc_easy", {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "Z"}, ""),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "answer": 4, "subject": "s"}, "the right choice is number 4 of 2"),
        ("mmlu", {"question": 3, "choices": ["a", "b"], "answer": 1, "subject": "s"}, "question is 3, which should be str"),
        ("truthfulqa", {"question": "q", "mc1_targets": {}, "mc2_targets": {}}, "it lacks the column 'choices'"),
        ("gsm8k", GSM8K | {"answer": 1}, "answer is 1, which should be str"),
        ("gsm8k_train", {"question": "q"}, "it lacks the column 'answer'"),
    ],
)
def test_a_row_of_a_benchmark_that_cannot_be_asked_is_named_with_its_file(tmp_path, name, row, why):
    whole = {
        "arc_easy": ARC,
        "gsm8k": GSM8K,
        "gsm8k_train": GSM8K,
        "mmlu": {"question": "q", "choices": ["a"], "answer": 0, "subject": "s"},
    }
    whole["truthfulqa"] = {"question": "q", **{f"mc{n}_targets": {"choices": ["a"], "labels": [1]} for n in (1, 2)}}
    for file, one in whole.items():
        (tmp_path / f"{file}.jsonl").write_text(json.dumps(one) + "\n")
    benchmark = name.partition("_train")[0]
    mode = "generate" if benchmark == "gsm8k" else "logprob"
    tasks.write_tasks([benchmark], mode, tmp_path, tmp_path / "tasks")
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    (tmp_path / f"{name}.jsonl").write_bytes(json.dumps(whole[name]).encode() + b"\n\n" + (line or b"{") + b"\n")
    message = told(tasks.write_tasks, [benchmark], mode, tmp_path, tmp_path / "tasks")
    assert f"{tmp_path / name}.jsonl:3 is not" in message
    assert why in message
    assert "--data" not in message  # it was given


def test_rows_that_the_harness_cannot_read_are_not_sought_on_the_hub(tmp_path):
    """What was given already is not advised."""
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps(ARC) + "\n")
    tasks.write_tasks(["arc_easy"], "logprob", tmp_path, tmp_path / "tasks")
    file = tmp_path / "tasks" / "posttrain_arc_easy.jsonl"
    file.write_text(file.read_text() + '{"question": [')
    message = told(tasks.load_tasks, str(tmp_path / "tasks"), ["posttrain_arc_easy"], 10**9)
    assert f"the harness cannot read the rows, as they stand in {file}" in message
    assert "--data" not in message
    message = told(tasks.write_tasks, ["arc_easy"], "logprob", file, tmp_path / "tasks")
    assert "it is a file, and not a folder of files" in message


@pytest.mark.slow
def test_the_commands_name_the_file(whole, tmp_path):
    """The same by the real commands, in processes of their own, under a locale that is not UTF-8."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    damaged(run / "run.json", "cut")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "arc_easy.jsonl").write_text("{}\n")
    recipe = [f"--{name}={value}" for name, value in VALUES.items()]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "DS_ACCELERATOR": "cpu"}
    for script, arguments, message in (
        ("report.py", [run], f"error: {run}/run.json is damaged: "),
        ("serve.py", ["--checkpoint", run], f"error: {run}/run.json is damaged: "),
        ("eval_benchmarks.py", ["--checkpoint", run, "--benchmark=arc_easy"], f"error: {run}/run.json is damaged: "),
        ("sft.py", [*recipe, f"--out_dir={tmp_path}/new", f"--ds_config={run}/run.json"], "error: "),
    ):
        command = [sys.executable, ROOT / "posttrain" / script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(message), done.stderr
        assert "Traceback" not in done.stderr
