"""A compiled layer is one graph, which stays whatever the lengths of the examples are, and computes what the layer does."""

import json

import pytest
from conftest import launch


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "zero"), [("sft", "zero1"), ("sft", "zero3"), ("dpo", "zero3")])
def test_no_graph_breaks_and_no_recompilation_for_other_lengths(tiny, kind, zero):
    done = launch("tests/compiled.py", tiny.folder, kind, zero)
    assert done.returncode == 0, done.stdout
    seen = json.loads(done.stdout.partition("seen ")[2].splitlines()[0])
    assert seen["first"]["graphs"] > 0
    assert seen["first"]["breaks"] == 0, done.stdout
    assert seen["then"] == seen["first"]
    assert seen["lengths"] > 10
    assert seen["compiled"] == pytest.approx(seen["plain"], rel=1e-5)
