"""Scripts of benchmarks/ and launch/ import much only where they need it: every name that they take from posttrain/ is there.

What they are asked wrongly, they refuse before they measure.
"""

import ast
import importlib
import json
import sys

import layout
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import sft
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
