"""The rules of the house, read from the source: python tests/layout.py prints the arrows between folders and broken rules.

Imports only go down: a folder of posttrain/ imports folders below it, the commands at the top of posttrain/ import any and are imported by
none, and data_prep/ imports what lies at or below posttrain/data.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

FOLDERS = (  # of posttrain/, lowest first; engine and run share a floor: neither imports the other
    *("common", "parallel", "data", "objectives", "operators", "recipes"),
    *(("engine", "run"), "model", "planning", "serving", "evaluation", "training", "cli", "commands"),
)
FLOOR = {name: floor for floor, names in enumerate(FOLDERS) for name in ([names] if isinstance(names, str) else names)}
COMMANDS = {"sft", "dpo", "serve", "eval_benchmarks", "eval_preferences", "convert", "plan", "report"}
USERS_OF_DEEPSPEED = {"engine"}  # folders
LONGEST, MOST_PARAMETERS = 60, 7  # a function has fewer lines, and no more parameters that a call may leave unnamed
OF_BYTES = {("os", "open"), ("gzip", "open")}  # functions that open no text by default
SCRIPT_FOLDERS = ("posttrain", "data_prep", "launch/quickstart", "launch/doctor")  # a script there puts its folder first on sys.path


class Import(NamedTuple):
    module: str  # posttrain.FOLDER.MODULE, posttrain.COMMAND or posttrain.FOLDER
    name: str | None  # what is taken out of the module; None for the module itself
    bound: str  # the name that it has in the importing file
    line: int


@cache
def nodes_of(source: str) -> list[ast.AST]:
    """Every node of a file's syntax tree."""
    return list(ast.walk(ast.parse(source)))


@cache
def libraries() -> set[str]:
    """Names of the installed packages and of the standard library, and one that transformers imports wherever it is there."""
    return {*packages_distributions(), *sys.stdlib_module_names, "kernels"}


def module_name(root: Path, path: Path) -> str:
    """The dotted name of a file of the repository."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def folder_of(module: str) -> str:
    """The folder of posttrain/ that a module lies in, `commands` for those at its top, or the first folder of another module."""
    top, *below = module.split(".")
    if top != "posttrain":
        return top
    return below[0] if below and below[0] in FLOOR else "commands"


def imports(root: Path, path: Path) -> Iterator[Import]:
    """What a file imports of posttrain/, wherever in the file."""
    for node in nodes_of(path.read_text()):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.split(".")[0] == "posttrain":
                    yield Import(one.name, None, one.asname or one.name, node.lineno)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "posttrain":
            for one in node.names:
                inner = root / f"{node.module}.{one.name}".replace(".", "/")
                if inner.with_suffix(".py").is_file() or inner.is_dir():
                    yield Import(f"{node.module}.{one.name}", None, one.asname or one.name, node.lineno)
                else:
                    yield Import(node.module, one.name, one.asname or one.name, node.lineno)


def sources(root: Path, *folders: str) -> list[Path]:
    """The Python files of some folders of the repository, at any depth."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def climbing_imports(root: Path) -> Iterator[str]:
    """Imports that do not go down, and modules of a folder that import each other in a circle."""
    inside: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sources(root, "posttrain", "data_prep"):
        here = module_name(root, path)
        own = folder_of(here)
        if own == "commands" and here.count(".") > 1:
            yield f"{path.relative_to(root)}:1: its folder is not in FOLDERS of tests/layout.py"
        if own == "commands" and here.count(".") == 1 and here.split(".")[1] not in COMMANDS:
            yield f"{path.relative_to(root)}:1: is not one of the commands, which alone lie at the top of posttrain/"
        for found in imports(root, path):
            other = folder_of(found.module)
            if own == "data_prep":
                allowed = FLOOR[other] <= FLOOR["data"]
            elif own == other and own != "commands":
                inside[own][here].add(found.module)
                allowed = True
            else:
                allowed = FLOOR[other] < FLOOR[own] and other != "commands"
            if not allowed:
                yield f"{path.relative_to(root)}:{found.line}: {own} imports {found.module}, which is not below it"
    for folder, arrows in inside.items():
        try:
            TopologicalSorter(arrows).prepare()
        except CycleError as error:
            yield f"posttrain/{folder}: imports in a circle: {' -> '.join(error.args[1])}"


def private_names(root: Path) -> Iterator[str]:
    """Private names that a file takes out of another module of posttrain/."""
    for path in sources(root, "posttrain", "data_prep", "launch"):
        modules = {}
        for found in imports(root, path):
            if found.name is None:
                modules[found.bound] = found.module
            elif found.name.startswith("_"):
                yield f"{path.relative_to(root)}:{found.line}: {found.name} is private to {found.module}"
        for node in nodes_of(path.read_text()):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name) or node.value.id not in modules:
                continue
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                yield f"{path.relative_to(root)}:{node.lineno}: {node.attr} is private to {modules[node.value.id]}"


def shadowing_names(root: Path) -> Iterator[str]:
    """Modules and folders beside a script that would be taken for a library of that name."""
    taken = libraries() - {"posttrain", "data_prep", "__init__"}
    for folder in SCRIPT_FOLDERS:
        for path in sorted((root / folder).glob("*")):
            file = path / "__init__.py" if path.is_dir() else path
            if file.suffix == ".py" and file.is_file() and path.stem in taken:
                yield f"{file.relative_to(root)}:1: shadows the library {path.stem}"


def strangers_of_deepspeed(root: Path) -> Iterator[str]:
    """Files outside engine/ that import DeepSpeed."""
    for path in sources(root, "posttrain"):
        if folder_of(module_name(root, path)) in USERS_OF_DEEPSPEED:
            continue
        for node in nodes_of(path.read_text()):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(name.split(".")[0] == "deepspeed" for name in names):
                yield f"{path.relative_to(root)}:{node.lineno}: imports deepspeed, which engine/ alone knows"


def sprawling_functions(root: Path) -> Iterator[str]:
    """Functions of LONGEST lines and more, or with more parameters than anybody can keep apart unless calls name them."""
    for path in sources(root, "posttrain", "data_prep"):
        for node in nodes_of(path.read_text()):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (lines := node.end_lineno - node.lineno + 1) >= LONGEST:
                yield f"{path.relative_to(root)}:{node.lineno}: {node.name} has {lines} lines"
            unnamed = [one for one in (*node.args.posonlyargs, *node.args.args) if one.arg not in ("self", "cls")]
            if len(unnamed) > MOST_PARAMETERS:
                yield f"{path.relative_to(root)}:{node.lineno}: {node.name} has {len(unnamed)} parameters that a call may leave unnamed"


def text_without_encoding(root: Path) -> Iterator[str]:
    """Files opened as text in the encoding of the machine's locale. Ruff's PLW1514 sees only paths whose type it can infer."""
    for path in sources(root, "posttrain", "data_prep", "launch", "benchmarks"):
        for node in nodes_of(path.read_text()):
            if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
                continue
            module = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else None
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            binary = any(isinstance(one, ast.Constant) and isinstance(one.value, str) and "b" in one.value for one in given)
            if name in ("read_text", "write_text") or (name in ("open", "fdopen") and not binary and (module, name) not in OF_BYTES):
                yield f'{path.relative_to(root)}:{node.lineno}: {name} lacks encoding="utf-8"'


def trusting_loads(root: Path) -> Iterator[str]:
    """Calls of transformers' Auto classes that do not refuse the code which may come with a folder: left out, it is asked for on stdin."""
    for path in sources(root, "posttrain", "data_prep", "launch"):
        for node in nodes_of(path.read_text()):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("from_pretrained", "from_config") or not ast.unparse(node.func.value).split(".")[-1].startswith(
                "Auto"
            ):
                continue
            if not any(one.arg == "trust_remote_code" and ast.unparse(one.value) == "False" for one in node.keywords):
                yield f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node.func)} without trust_remote_code=False"


RULES = (
    climbing_imports,
    private_names,
    shadowing_names,
    strangers_of_deepspeed,
    sprawling_functions,
    text_without_encoding,
    trusting_loads,
)


def broken_rules(root: Path) -> list[str]:
    """A line for each broken rule, FILE:LINE: what is wrong."""
    return [line for rule in RULES for line in rule(root)]


def arrows(root: Path) -> dict[tuple[str, str], int]:
    """How many imports go from one folder of posttrain/ to another."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    for path in sources(root, "posttrain"):
        own = folder_of(module_name(root, path))
        for one in imports(root, path):
            if folder_of(one.module) != own:
                found[own, folder_of(one.module)] += 1
    return found


if __name__ == "__main__":
    repository = Path(__file__).resolve().parents[1]
    every = arrows(repository)
    for name in reversed(FLOOR):
        print(f"{name:12}-> {', '.join(f'{below} {count}' for (above, below), count in sorted(every.items()) if above == name)}")
    print(f"{len(every)} arrows between {len(FLOOR)} folders on {len(FOLDERS)} floors")
    problems = broken_rules(repository)
    print("\n".join(problems))
    sys.exit(bool(problems))
