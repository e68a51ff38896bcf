"""A compiled layer is one graph, which stays whatever the lengths of the examples are, and computes what the layer does."""

import json

import pytest
from conftest import launch


@pytest.mark.slow
def test_no_graph_breaks_and_no_recompilation_for_other_lengths(tiny):
    done = launch("tests/compiled.py", tiny.folder)
    assert done.returncode == 0, done.stdout
    results = json.loads(done.stdout.partition("seen ")[2].splitlines()[0])
    assert len(results) == 3
    for seen in results:
        assert seen["first"]["graphs"] > 0, seen
        assert seen["first"]["breaks"] == 0, seen
        assert seen["then"] == seen["first"], seen
        assert seen["lengths"] > 10, seen
        assert seen["compiled"] == pytest.approx(seen["plain"], rel=1e-5), seen
