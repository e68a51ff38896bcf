"""The shape of the repository: imports go down, no module shadows a library, the README's tree is the tree on disk."""

import ast
import re
import shutil
import sys
from pathlib import Path

import mutations

ROOT = Path(__file__).parents[1]
FLOORS = [  # lowest first; a module imports only from floors below its own, or earlier names of its own floor
    *(
        "losses",
        "config",
        "schedule",
        "batches",
        "chat",
        "hub",
        "errors",
        "records",
        "terminal",
        "rendezvous",
        "watchdog",
        "ranks",
        "storage",
    ),
    *("stopping", "entry", "card", "charts", "tracking"),
    *("layers", "attention", "logprob", "data", "ckpt_pt", "parity", "tokenization"),
    *(
        "guard",
        "objectives",
        "health",
        "engine",
        "checks",
        "shards",
        "checkpoint",
        "policy",
        "memory",
        "planner",
        "timing",
        "export",
        "run",
        "reference",
        "assistant",
    ),
    *("step", "samples", "exams", "fit", "keeper", "loop"),
]
SCRIPTS = {"sft", "dpo", "convert", "plan", "report", "serve", "eval_benchmarks", "eval_preferences"}
PACKAGES = {  # of scripts; lowest first, above all floors
    "serving": ["sampling", "text", "schema", "votes", "walls", "batching", "vllm_batching", "app"],
    "evaluation": ["tasks", "measure", "compare", "judge", "pairs"],
}


def imported(path: Path) -> set[str]:
    """Names of posttrain modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "posttrain":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posttrain."):
            name, *below = node.module.split(".")[1:]
            found |= {f"{name}/{module}" for module in below or [one.name for one in node.names]} if name in PACKAGES else {name}
    return found


def test_imports_only_go_down():
    modules = {path.stem: path for path in (ROOT / "posttrain").glob("*.py") if path.stem != "__init__"}
    assert set(modules) == set(FLOORS) | SCRIPTS
    for index, name in enumerate(FLOORS):
        # what of evaluation/ is for training, too, imports nothing from above assistant
        assert imported(modules[name]) - {"evaluation/tasks", "evaluation/measure"} <= set(FLOORS[:index]), name
    for package, names in PACKAGES.items():
        files = {path.stem: path for path in (ROOT / "posttrain" / package).glob("*.py") if path.stem != "__init__"}
        assert set(files) == set(names)
        for index, name in enumerate(names):
            assert imported(files[name]) <= {*FLOORS, *(f"{package}/{below}" for below in names[:index])}, name


def test_every_mutation_still_has_its_place(tmp_path):
    """tests/mutations.py, which takes minutes, changes code by its text: the text must be there, once."""
    shutil.copytree(ROOT / "posttrain", tmp_path / "posttrain")
    for mutation in mutations.MUTATIONS.values():
        before = (tmp_path / mutation.file).read_text()
        mutations.mutate(tmp_path, mutation)
        (tmp_path / mutation.file).write_text(before)
        file, function = mutation.test.split("[")[0].split("::")
        assert f"def {function}(" in (ROOT / file).read_text()
    assert f"breaks the code in {len(mutations.MUTATIONS)} ways" in (ROOT / "README.md").read_text()


def test_deepspeed_is_touched_only_where_engines_and_checkpoints_are():
    users = {path.stem for path in (ROOT / "posttrain").glob("*.py") if re.search(r"^(import|from) deepspeed", path.read_text(), re.M)}
    assert users <= {"engine", "checkpoint", "shards", "storage"}


def test_no_module_shadows_a_library():
    """Running posttrain/sft.py puts posttrain/ first on sys.path, so a module there named like a library would be taken for it."""
    from importlib.metadata import packages_distributions

    libraries = set(packages_distributions()) | set(sys.stdlib_module_names)
    for folder in ("posttrain", "data_prep", "launch/quickstart"):
        names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert not names & libraries, folder


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    tree = (ROOT / "README.md").read_text().split("## Layout")[1]
    for folder in ("data_prep", "posttrain"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem == "__init__" or path.name in tree, path
    for name in re.findall(r"\b\w+\.(?:py|sh)\b", tree):
        assert any((ROOT / folder / name).is_file() for folder in ("data_prep", "posttrain", "launch", "benchmarks")), name
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert path.stem in tree, path
