"""The shape of the repository: the rules of tests/layout.py hold, and can be broken; the trees in the texts are those on disk."""

import re
import shutil
from pathlib import Path

import layout
import mutations
import pytest

ROOT = Path(__file__).parents[1]


def test_the_rules_of_the_house_hold():
    assert layout.broken_rules(ROOT) == []


BELOW = "which is not below it"
BROKEN = [
    ("posttrain/data/packing.py", "from posttrain.recipes.keys import Recipe", f"data imports posttrain.recipes.keys, {BELOW}"),
    ("posttrain/engine/start.py", "def f():\n    from posttrain.run import health", f"engine imports posttrain.run.health, {BELOW}"),
    ("posttrain/training/loop.py", "import posttrain.serve", f"training imports posttrain.serve, {BELOW}"),
    ("data_prep/formats/rows.py", "from posttrain.model import loading", f"data_prep imports posttrain.model.loading, {BELOW}"),
    ("posttrain/common/hub.py", "from posttrain.common.files import read_lines", None),
    ("posttrain/run/health.py", "from posttrain.run.card import _number", "_number is private to posttrain.run.card"),
    ("data_prep/choose.py", "from posttrain.data import chat\n\nchat._settings_lock", "_settings_lock is private to posttrain.data.chat"),
    ("posttrain/logging.py", "", "shadows the library logging"),
    ("posttrain/datasets/__init__.py", "", "shadows the library datasets"),
    ("posttrain/kernels/__init__.py", "", "shadows the library kernels"),
    ("data_prep/types.py", "", "shadows the library types"),
    ("posttrain/run/logging.py", "", None),  # no script lies beside it
    ("posttrain/helpers.py", "", "is not one of the commands, which alone lie at the top of posttrain/"),
    ("posttrain/model/loading.py", "def f():\n    import deepspeed.comm", "imports deepspeed, which engine/ alone knows"),
    ("posttrain/common/hub.py", "def f(a, b, c, d, e, f, g, h): ...", "f has 8 parameters that a call may leave unnamed"),
    ("posttrain/common/hub.py", "def f(a, *, b, c, d, e, f, g, h): ...", None),
    ("launch/set_up.py", "Path('x').read_text()", 'read_text lacks encoding="utf-8"'),
    ("posttrain/common/hub.py", "def f(path):\n    path.open('a')", 'open lacks encoding="utf-8"'),
    ("posttrain/common/hub.py", "def f(path):\n    path.open('ab'), os.open(path, os.O_RDONLY)", None),
    ("launch/set_up.py", "m.AutoConfig.from_pretrained(1)", "m.AutoConfig.from_pretrained without trust_remote_code=False"),
    (
        "data_prep/formats/rows.py",
        "AutoModel.from_config(1, trust_remote_code=True)",
        "AutoModel.from_config without trust_remote_code=False",
    ),
    ("data_prep/formats/rows.py", "def long():\n" + "    print()\n" * 59, "long has 60 lines"),
]


@pytest.mark.parametrize("file, text, problem", BROKEN)
def test_a_broken_rule_is_named_with_its_line(tmp_path, file, text, problem):
    for folder in ("posttrain", "data_prep", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    begin = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as opened:
        opened.write(text + "\n")
    found = layout.broken_rules(tmp_path)
    if problem is None:
        assert found == []
        return
    assert any(line.startswith(f"{file}:") and line.endswith(problem) for line in found), found
    place = int(next(line for line in found if line.endswith(problem)).split(":")[1])
    assert place == 1 if not begin else begin < place <= begin + len(text.splitlines())


def test_a_circle_within_a_folder_is_found(tmp_path):
    for name, other in (("files", "hub"), ("hub", "errors"), ("errors", "files")):
        path = tmp_path / "posttrain" / "common" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from posttrain.common import {other}\n")
    (found,) = layout.broken_rules(tmp_path)
    assert found.startswith("posttrain/common: imports in a circle: ")


def test_every_mutation_still_has_its_place(tmp_path):
    """tests/mutations.py, which takes minutes, changes code by its text: the text must be there, once."""
    for folder in ("posttrain", "data_prep", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for mutation in mutations.MUTATIONS.values():
        before = (tmp_path / mutation.file).read_text()
        mutations.mutate(tmp_path, mutation)
        (tmp_path / mutation.file).write_text(before)
        file, function = mutation.test.split("[")[0].split("::")
        assert f"def {function}(" in (ROOT / file).read_text()
    assert f"breaks the code in {len(mutations.MUTATIONS)} ways" in (ROOT / "docs" / "correctness.md").read_text()


def test_the_trees_in_the_texts_are_the_tree_on_disk():
    short = (ROOT / "README.md").read_text().split("## Layout")[1]
    tree = (ROOT / "docs" / "architecture.md").read_text().split("## Where things are")[1]
    for folder in ("data_prep", "posttrain"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem == "__init__" or path.name in tree, path
    for folder in [*(ROOT / "posttrain").glob("*/__init__.py"), *(ROOT / "data_prep").glob("*/__init__.py")]:
        assert all(re.search(rf"^  {folder.parent.name}/ .*$", text, re.M) for text in (short, tree)), folder.parent
    for name in re.findall(r"\b\w+\.(?:py|sh)\b", short + tree):
        assert any((ROOT / folder / name).is_file() for folder in ("data_prep", "posttrain", "launch", "benchmarks", "tests")), name
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert path.stem in tree, path
