"""Scripts of benchmarks/ and launch/ import much only where they need it: every name that they take from posttrain/ is there.

What they are asked wrongly, they refuse before they measure.
"""

import ast
import importlib
import json
import sys

import layout
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT))

from benchmarks import first_minutes, sft
from benchmarks.side_by_side import draw_rows, make_world


@pytest.mark.parametrize("path", layout.sources(ROOT, "benchmarks", "launch"), ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(path):
    modules = {}
    for found in layout.imports(ROOT, path):
        module = importlib.import_module(found.module)
        assert found.name is None or hasattr(module, found.name), f"{path}:{found.line}: {found.module} has no {found.name}"
        if found.name is None:
            modules[found.bound] = module
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{path}:{node.lineno}: {node.value.id} has no {node.attr}"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--rows", "{rows}"], "missing: --tokenizer, --name"),
        (["--tokenizer", "{tokenizer}", "--name", "mine"], "missing: --rows"),
        (["--rows", "{rows}.gone", "--tokenizer", "{tokenizer}", "--name", "mine"], "--rows .*gone: there is no such file"),
        (["--rows", "{rows}", "--tokenizer", "{tokenizer}_gone", "--name", "mine"], "--tokenizer .*gone: there is no such folder"),
        (["--rows", "{rows}", "--tokenizer", "{tokenizer}", "--name", "mine"], "needs 448 rows of at most 4,096 tokens .* has 60$"),
    ],
)
def test_a_race_on_real_rows_refuses_what_it_cannot_run(tiny, monkeypatch, given, sentence):
    places = {"rows": f"{tiny.folder}/sft.jsonl", "tokenizer": tiny.base}
    monkeypatch.setattr(sys, "argv", ["sft.py", *(word.format(**places) for word in given)])
    with pytest.raises(SystemExit, match=f"^sft.py: .*{sentence}") as refused:
        sft.main()
    assert "\n" not in str(refused.value)


def test_real_rows_are_drawn_alike_each_time_and_all_trained_on(tiny, tmp_path):
    rows = [json.loads(line) for line in (tiny.folder / "sft.jsonl").read_text().splitlines()]
    rows[3]["output"] = "ta " * 400
    rows[5]["output"] = ""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows + rows[:6])))
    race = sft.RACES["dry"]
    given, again = (draw_rows(tmp_path / "rows.jsonl", tiny.base, 48, 200) for _ in range(2))
    assert given == again
    assert not [row for row in given.rows if row in (rows[3], rows[5])]
    data = make_world(race, tmp_path, given)
    assert data["rows"] == 48
    assert data["mean_lengths"]["input_ids"] == round(given.mean_tokens, 1)


def test_the_first_minutes_see_the_first_step_and_the_largest_weight_that_differ(tmp_path):
    for name, loss, weight in (("one", 2.0, 1.0), ("same", 2.0, 1.0), ("other", 2.0 + 1e-15, 1.0), ("last", 2.0, 1.0 + 2**-20)):
        (tmp_path / name / "final").mkdir(parents=True)
        records = [{"split": "train", "step": step, "loss": loss if step == 2 else 2.0, "grad_norm": 1.0} for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        save_file({"w": torch.tensor([0.5, weight])}, tmp_path / name / "final" / "model.safetensors")
    same, other, last, absent = (first_minutes.difference(tmp_path / "one", tmp_path / name) for name in ("same", "other", "last", "no"))
    assert list(same.values()) == [0, 0, None]
    assert other["losses and norms"] > 0 and other["weights"] == 0 and other["first step that differs"] == 2
    assert last["losses and norms"] == 0 and last["weights"] == 2**-20
    assert absent == "did not run"


def test_what_a_part_of_the_first_minutes_has_found_stays_where_it_does_not_end(tmp_path):
    found = {"about": {"machine": "this one"}, "rows": {"cores": 2}}
    (tmp_path / "versions.json").write_text(json.dumps(found))
    about, result = first_minutes.attempt("versions", first_minutes.Here(True, tmp_path), 0.1)
    assert about == found["about"]
    assert result["outcome"] == "ended after 0 s" and result["cores"] == 2 and result["seconds"] < 60


@pytest.mark.slow
def test_a_part_of_the_first_minutes_that_fails_says_why(tmp_path):
    (tmp_path / "versions.new").mkdir()  # where its rows are to be written
    about, result = first_minutes.attempt("versions", first_minutes.Here(True, tmp_path), 300)
    assert not about
    assert result["outcome"] == "exit code 1" and "IsADirectoryError" in result["output"]


@pytest.mark.slow
def test_the_first_minutes_keep_what_an_earlier_call_has_found_on_the_same_machine(tmp_path, monkeypatch):
    file, parts = tmp_path / "found.json", {"layers": {"outcome": "done"}}

    def measure() -> dict:
        monkeypatch.setattr(sys, "argv", ["first_minutes.py", "versions", "--dry", "--out", str(file)])
        first_minutes.main()
        return json.loads(file.read_text())

    file.write_text(json.dumps({"about": {"machine": "another"}, "parts": parts}))
    alone = measure()
    assert list(alone["parts"]) == ["versions"] and alone["parts"]["versions"]["cores"] > 0
    file.write_text(json.dumps(alone | {"parts": parts}))
    assert list(measure()["parts"]) == ["layers", "versions"]


def test_the_first_minutes_refuse_a_part_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["first_minutes.py", "layer", "--dry"])
    with pytest.raises(SystemExit, match="there is no part layer; there are versions, layers, "):
        first_minutes.main()
