"""Scripts of benchmarks/ and launch/ import much only where they need it: every name that they take from posttrain/ is there."""

import ast
import importlib

import layout
import pytest
from conftest import ROOT


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
