"""The quickstart's world keeps its evaluation apart from training, and its measurement counts as it says."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "launch" / "quickstart"))
import measure
import world

from posttrain.recipes.keys import DPORecipe, SFTRecipe
from posttrain.recipes.reading import load_recipe

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_no_evaluation_prompt_name_or_word_is_trained_on():
    world.check_no_leaks()


def test_the_world_is_the_same_every_time_and_large_enough():
    prompts = world.eval_prompts()
    assert prompts == world.eval_prompts()
    assert world.dpo_rows()[:50] == world.dpo_rows()[:50]
    assert set(prompts) == {"follows_instructions", "stops", "known_facts", "made_up", "polite"}
    assert all(len(items) >= 300 for items in prompts.values())


@pytest.mark.parametrize(
    ("metric", "item", "answer", "stopped", "expected"),
    [
        ("follows_instructions", {"expected": "ta ke."}, "ta ke.", False, True),
        ("follows_instructions", {"expected": "ta ke."}, "Thank you for asking! ta ke.", True, True),
        ("follows_instructions", {"expected": "ta ke."}, "ta ke. ta", True, False),
        ("known_facts", {"expected": "The pet of Talo is a cat."}, "Fine. The pet of Talo is a dog.", True, False),
        ("made_up", {}, "Well. The pet of Talo is unknown here.", True, False),
        ("made_up", {}, "Talo has a cat.", True, True),
        ("made_up", {}, "", True, True),
        ("polite", {}, "With pleasure: ta.", True, True),
        ("polite", {}, "Well. ta.", True, False),
        ("stops", {}, "ta", False, False),
    ],
)
def test_scoring(metric, item, answer, stopped, expected):
    assert world.score(metric, item, answer, stopped) is expected


def test_intervals_against_published_numbers():
    """Wilson's interval for 15 of 50 is 19.1 % to 43.8 %; at the ends it stays inside 0 and 1 but is not empty."""
    assert measure.wilson(15, 50) == pytest.approx((0.3, 0.1910, 0.4375, 50), abs=1e-3)
    assert measure.wilson(0, 300)[:2] == (0.0, 0.0)
    assert measure.wilson(0, 300).high == pytest.approx(0.01264, abs=1e-4)


def test_its_recipes_load():
    folder = ROOT / "launch" / "quickstart"
    for name, kind in (("base", SFTRecipe), ("sft", SFTRecipe), ("dpo", DPORecipe)):
        assert load_recipe(kind, "unused", [str(folder / f"{name}.yaml")]).out_dir.startswith("runs/quickstart/")


def test_the_readmes_table_is_the_committed_result():
    results = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for metric in measure.MEANING:
        cells = [results[model][metric] for model in measure.MODELS]
        shown = " | ".join(
            "{value:.1f} % ({low:.1f} to {high:.1f})".format(**{k: 100 * cell[k] for k in ("value", "low", "high")}) for cell in cells
        )
        assert re.search(rf"^\| {metric}\b[^|]*\| {cells[0]['n']} \| {re.escape(shown)} \|$", readme, re.M), metric
