"""One curve for every layout: a small part of the grid of benchmarks/invariance.py, run as a user would, and the grid itself."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LN_2 = 0.693147


@pytest.fixture(scope="module")
def invariance():
    """benchmarks/invariance.py as a module; importing it changes sys.path, which is put back."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("invariance", ROOT / "benchmarks" / "invariance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.slow
def test_every_layout_draws_the_same_curve(invariance, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "invariance.py"), "--small", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout
    cells = json.loads((tmp_path / "invariance.json").read_text())["cells"]
    assert len(cells) == len(invariance.grid(small=True))
    for cell in cells:
        assert abs(cell["last_loss"] - cell["first_loss"]) > 0.01, cell  # the curves are not flat
        for name, bound in invariance.BOUNDS[cell["dtype"]].items():
            assert cell["differences"][name] <= bound, (cell, name)
        if cell["kind"] == "dpo":
            nll = (cell["first_loss"] - LN_2) / 0.3  # the chosen-NLL term on top
            assert 5 < nll < 7.5
    assert f"| {invariance.describe(cells[-1])} |" in (tmp_path / "invariance.md").read_text()


@pytest.mark.parametrize("small", [True, False])
def test_every_setting_meets_every_other_in_some_cell(invariance, small):
    cells = invariance.grid(small)
    for kind, extra in (("sft", {}), ("dpo", invariance.DPO_FACTORS)):
        factors = (invariance.SMALL if small else invariance.FACTORS) | extra
        for (a, xs), (b, ys) in itertools.combinations(factors.items(), 2):
            for x, y in itertools.product(xs, ys):
                assert any(cell["kind"] == kind and cell[a] == x and cell[b] == y for cell in cells), (kind, a, x, b, y)


def test_a_difference_is_seen(invariance):
    """The comparison itself: a loss that is off, and one that is off to one side by less than the pointwise bound."""
    import torch

    def result(shift: float, first: float = 0.0) -> dict:
        curve = [{"loss": 6.0 + shift + first * (not step), "grad_norm": 0.5, "rewards/accuracies": step / 9} for step in range(9)]
        return {"curve": curve, "validation": {"loss": 5.0}}

    weights = {"w": torch.zeros(3)}
    bounds = invariance.BOUNDS["float32"]
    for changed, expected in (((0.0, 0.0), set()), ((0.0, 2e-4), {"loss", "drift"}), ((4e-5, 0.0), {"drift"}), ((0.0, 2e-5), set())):
        found = invariance.differences(result(*changed), result(0.0), weights, weights)
        assert {name for name, value in found.items() if not value <= bounds[name]} == expected
    moved = invariance.differences(result(0.0), result(0.0), {"w": torch.tensor([0, 0, 1e-4])}, weights)
    assert not moved["weights"] <= bounds["weights"]


def test_the_committed_table_is_whole_and_within_its_bounds(invariance):
    """As `python benchmarks/invariance.py --all` wrote it."""
    result = json.loads((ROOT / "benchmarks" / "results" / "invariance.json").read_text())
    settings = [{name: cell[name] for name in expected} for cell, expected in zip(result["cells"], invariance.grid(False), strict=True)]
    assert settings == invariance.grid(False)
    assert result["bounds"] == invariance.BOUNDS
    assert not [cell for cell in result["cells"] if cell["exceeded"]]
    assert result["steps"] == 20
    assert (ROOT / "benchmarks" / "results" / "invariance.md").read_text() == invariance.table(result["cells"], result)
