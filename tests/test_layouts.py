"""One curve for every layout: a small part of the grid of benchmarks/invariance.py, run as a user would, and the grid itself."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
from conftest import launch

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
def test_every_layout_draws_the_same_curve(invariance, tmp_path, monkeypatch):
    """One rank under its own launch, more forked from the warm process."""
    own_launch = invariance.launch

    def launch_warm(folder: Path, ranks: int) -> None:
        if ranks == 1:
            own_launch(folder, ranks)
        else:
            done = launch("benchmarks/invariance.py", "--worker", folder, ranks=ranks, timeout=600)
            assert done.returncode == 0, done.stdout

    monkeypatch.setattr(invariance, "launch", launch_warm)
    monkeypatch.setattr(sys, "argv", ["invariance.py", "--small", "--out", str(tmp_path)])
    invariance.main()
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
    """The comparison itself: a loss that is off, one that is off to one side by less than the pointwise bound, and so on."""
    import torch

    def result(loss: float = 0.0, first: float = 0.0, norm: float = 0.0, validation: float = 0.0) -> dict:
        curve = [{"loss": 6.0 + loss + first * (not step), "grad_norm": 0.5 + norm * (step == 4)} for step in range(9)]
        return {"curve": curve, "validation": {"loss": 5.0 + validation}}

    bounds, still = invariance.BOUNDS["float32"], {"w": torch.zeros(3)}
    cases = [({}, still, set()), ({"first": 2e-4}, still, {"loss", "drift"}), ({"loss": 4e-5}, still, {"drift"})]
    cases += [({"first": 2e-5}, still, set()), ({"norm": 2e-5}, still, {"grad_norm"}), ({"validation": 1e-4}, still, {"validation"})]
    cases += [({}, {"w": torch.tensor([0, 0, 1e-4])}, {"weights"}), ({"norm": math.nan}, still, {"grad_norm"})]
    cases += [({}, {"w": torch.tensor([0, math.nan, 0])}, {"weights"})]
    for changed, weights, expected in cases:
        found = invariance.differences(result(**changed), result(), weights, still)
        assert {name for name, value in found.items() if not value <= bounds[name]} == expected, changed


def test_the_committed_table_is_whole_and_within_its_bounds(invariance):
    """As `python benchmarks/invariance.py --all` wrote it."""
    result = json.loads((ROOT / "benchmarks" / "results" / "invariance.json").read_text())
    settings = [{name: cell[name] for name in expected} for cell, expected in zip(result["cells"], invariance.grid(False), strict=True)]
    assert settings == invariance.grid(False)
    assert result["bounds"] == invariance.BOUNDS
    for cell in result["cells"]:
        assert not cell["exceeded"]
        assert all(cell["differences"][name] <= bound for name, bound in invariance.BOUNDS[cell["dtype"]].items())
    assert f"in {len(result['cells'])} cells" in (ROOT / "docs" / "correctness.md").read_text()
    assert result["steps"] == 20
    assert (ROOT / "benchmarks" / "results" / "invariance.md").read_text() == invariance.table(result["cells"], result)
