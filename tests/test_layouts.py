"""One curve for every layout: ranks, ZeRO stage, micro-batches and checkpointing change speed, never the numbers."""

import json

import pytest
from conftest import launch

pytestmark = pytest.mark.slow
LN_2 = 0.693147


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory) -> dict[str, dict]:
    """{case: {layout: history}} over one, two and three ranks."""
    merged: dict[str, dict] = {}
    for ranks in (1, 2, 3):
        out = tmp_path_factory.mktemp("layouts") / "out.json"
        done = launch("tests/layouts.py", str(out), str(tiny.folder), ranks=ranks, timeout=600)
        assert out.is_file(), done.stdout
        for case, layouts in json.loads(out.read_text()).items():
            merged.setdefault(case, {}).update({f"{ranks} ranks, {name}": history for name, history in layouts.items()})
    return merged


def worst(layouts: dict[str, list]) -> tuple[float, str]:
    """The largest difference of any number from the first layout's, relative to 1 or the value, and where."""
    (_, yardstick), *others = layouts.items()
    return max(
        (abs(value - right) / max(1.0, abs(right)), f"{name}, step {step + 1}")
        for name, history in others
        for step, (values, rights) in enumerate(zip(history, yardstick, strict=True))
        for value, right in zip(values, rights, strict=True)
    )


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_float32_curves_agree_to_rounding(results, kind):
    difference, where = worst(results[f"{kind} float32"])
    assert difference < 1e-5, where


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_bfloat16_curves_stay_in_a_band(results, kind):
    difference, where = worst(results[f"{kind} bfloat16"])
    assert difference < 0.05, where


def test_the_curves_are_not_flat_and_dpo_starts_at_ln_2(results):
    for case, layouts in results.items():
        for name, history in layouts.items():
            assert abs(history[0][0] - history[-1][0]) > 0.01, (case, name)
    for history in results["dpo float32"].values():
        nll = (history[0][0] - LN_2) / 0.3  # the chosen-NLL term on top
        assert 5 < nll < 7.5
        assert history[0][2] == pytest.approx(0, abs=1e-5)
