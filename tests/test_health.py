"""What the health line says, and that it says nothing of a run that goes as most do."""

import json
import random

import pytest
from conftest import ROOT

from posttrain.recipes.keys import DPORecipe, SFTRecipe
from posttrain.recipes.reading import build_recipe
from posttrain.run.health import Facts, Health

FACTS = Facts(parameters=1_700_000_000, rows=10_000, copies=0, weight_scale=0.03, answer_tokens=200.0)
STEPS = 400


def health(kind: str, facts: Facts = FACTS, **keys) -> Health:
    paths = {"sft": ("checkpoint_path", "sft_data_dir"), "dpo": ("sft_checkpoint_path", "dpo_data_dir")}[kind]
    values = {paths[0]: "model", paths[1]: "data", "out_dir": "run", "max_iters": STEPS, "global_batch_size": 64, **keys}
    return Health(build_recipe(SFTRecipe if kind == "sft" else DPORecipe, values, {}), STEPS, facts)


def sft(step: int, draw: random.Random) -> dict[str, float]:
    """A usual step: the loss falls from 1.6 to 1.1, with noise."""
    return {"loss": 1.1 + 0.5 * 0.97**step + draw.gauss(0, 0.05), "grad_norm": 1 + 0.3 * draw.random(), "learning_rate": 2e-5}


def dpo(step: int, draw: random.Random) -> dict[str, float]:
    """A usual step: accuracy to 0.75, rewards of a few tenths, both log-probs a little lower."""
    share = step / STEPS
    return {
        "loss": 0.693 - 0.15 * share + draw.gauss(0, 0.02),
        "preference_loss": 0.693 - 0.15 * share + draw.gauss(0, 0.02),
        "nll_loss": 1.2 + 0.1 * share + draw.gauss(0, 0.05),
        "rewards/chosen": -0.3 * share,
        "rewards/rejected": -0.9 * share,
        "rewards/accuracies": 0.5 + 0.25 * share,
        "logps/accuracies": 0.45 + draw.gauss(0, 0.06),
        "grad_norm": 4 + draw.random(),
        "learning_rate": 5e-7,
    }


def findings(kind: str, change=lambda step, metrics: metrics, steps: int = STEPS, watch: Health | None = None) -> list[tuple[int, str]]:
    watch, draw = watch or health(kind, **USUAL[kind]), random.Random(1)
    found = [(0, finding.name) for finding in watch.before()]
    for step in range(1, steps + 1):
        metrics = change(step, (sft if kind == "sft" else dpo)(step, draw))
        found += [(step, finding.name) for finding in watch.see(step, "train", metrics)]
    return found


USUAL = {"sft": {"learning_rate": 2e-5}, "dpo": {"learning_rate": 5e-7}}
ILLNESSES = {  # kind, what is changed of a usual step's metrics
    "loss rises": ("sft", lambda step, m: m | {"loss": m["loss"] + 0.03 * step}),
    "loss does not fall": ("sft", lambda step, m: m | {"loss": 1.6}),
    "gradient spikes": ("sft", lambda step, m: m | {"grad_norm": 9.0 if step % 6 == 0 else 1.0}),
    "update too small": ("sft", lambda step, m: m | {"bf16_changed": 1e-6}),
    "swapped": ("dpo", lambda step, m: m | {"logps/accuracies": 0.1}),
    "saturated": ("dpo", lambda step, m: m | {"rewards/accuracies": 1.0, "preference_loss": 0.7 if step < 6 else 0.001}),
    "chosen log-prob falls": ("dpo", lambda step, m: m | {"nll_loss": 1.2 + 0.03 * step}),
    "far from the reference": ("dpo", lambda step, m: m | {"rewards/chosen": -1.5 * step}),
}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_nothing_is_said_of_a_usual_run(kind):
    assert findings(kind) == []


@pytest.mark.parametrize("illness", ILLNESSES)
def test_an_illness_is_named_once_within_the_first_tenth(illness):
    kind, change = ILLNESSES[illness]
    ((step, name),) = findings(kind, change)
    assert name == illness
    assert step <= STEPS / 10 or illness == "loss does not fall"  # which nobody can know before


@pytest.mark.parametrize(("nats", "named"), [(3.0, []), (8.0, ["far from the reference"])])
def test_rejected_answers_are_meant_to_become_unlikely(nats, named):
    """DPO of right above wrong answers was seen to make the wrong ones less likely by 3 nats a token, and to go well."""
    found = findings("dpo", lambda step, m: m | {"rewards/rejected": -nats * 0.1 * FACTS.answer_tokens})
    assert [name for _, name in found] == named


def test_ill_runs_were_named_within_their_first_tenth_and_well_ones_left_alone():
    """What python benchmarks/health.py has seen."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "health.json").read_text())["runs"]
    expected = {
        "SFT, learning rate x 100": "learning rate too large",
        "DPO, chosen and rejected swapped": "swapped",
        "SFT, every second row twice": "duplicated data",
    }
    assert len(runs) == 6
    for name, run in runs.items():
        early = [finding["name"] for finding in run["findings"] if finding["step"] <= run["of"] / 10]
        assert (expected[name] in early) if run["ill"] else (run["findings"] == [] and run["steps"] == run["of"]), (name, run)


@pytest.mark.parametrize("keys", [{"reference_free": True}, {"loss": "simpo", "beta": 2.0}])
def test_rewards_without_a_reference_are_no_distance(keys):
    _, change = ILLNESSES["far from the reference"]
    assert findings("dpo", change, watch=health("dpo", **USUAL["dpo"], **keys)) == []


def test_few_gradients_where_most_is_learnt_are_no_spikes():
    """The quickstart's DPO was seen to end so: a median of 0.5, where it began with 1.7, and norms of up to 5.7."""
    assert findings("sft", lambda step, m: m | {"grad_norm": 1.7 if step < 200 else 5.7 if step % 6 == 0 else 0.5}) == []


def test_a_value_that_is_not_finite_is_no_comfort():
    assert [name for _, name in findings("sft", lambda step, m: m | {"loss": None if step > 20 else m["loss"]})] == ["loss rises"]


@pytest.mark.parametrize(
    ("kind", "learning_rate", "named"),
    [
        ("sft", 2e-5, None),
        ("sft", 2e-3, "learning rate too large"),
        ("sft", 2e-8, "learning rate too small"),
        ("dpo", 5e-7, None),
        ("dpo", 1e-3, "learning rate too large"),
    ],
)
def test_a_learning_rate_is_judged_by_the_weights_it_moves(kind, learning_rate, named):
    found = [finding.name for finding in health(kind, learning_rate=learning_rate).before()]
    assert found == ([named] if named else [])


def test_copies_are_told_of_before_the_first_step():
    (finding,) = health("sft", FACTS._replace(copies=5000)).before()
    assert str(finding).startswith("5,000 of 10,000 training rows (50%) are exact copies of others")
    assert health("sft", FACTS._replace(copies=100)).before() == []


@pytest.mark.parametrize(
    ("split", "loss", "named"), [("eval", 13.7, True), ("eval", 7.5, False), ("train", 13.7, True), ("train", 7.5, False)]
)
def test_a_start_worse_than_chance_is_told_of(split, loss, named):
    watch = health("sft", FACTS._replace(vocabulary=722))  # ln 722 = 6.58; 13.7 was seen with the ids of another tokenizer
    record = sft(1, random.Random(0)) | {"loss": loss} if split == "train" else {"loss": loss}
    assert ["worse than chance"] * named == [finding.name for finding in watch.see(split == "train", split, record)]
    assert not [one for one in watch.see(2, split, record | {"loss": 20.0}) if one.name == "worse than chance"]


def test_a_validation_that_rises_twice_is_told_of():
    watch = health("sft")
    assert not [found for loss in (1.5, 1.3, 1.35, 1.31) for found in watch.see(0, "eval", {"loss": loss})]
    watch = health("sft")
    found = [(loss, finding.name) for loss in (1.5, 1.3, 1.35, 1.4) for finding in watch.see(0, "eval", {"loss": loss})]
    assert found == [(1.4, "validation rises")]


def test_validation_pairs_that_say_the_opposite_are_told_of():
    watch = health("dpo")
    findings("dpo", lambda step, m: m | {"rewards/accuracies": 0.7}, 100, watch)
    assert not watch.see(100, "eval", {"loss": 0.6, "rewards/margins": 0.2, "rewards/accuracies": 0.6})
    (finding,) = watch.see(100, "eval", {"loss": 0.6, "rewards/margins": -0.2, "rewards/accuracies": 0.3})
    assert "swapped in one of them" in finding.what


def test_answers_that_grow_longer_are_told_of_in_dpo():
    watch = health("dpo")
    found = [(tokens, finding.name) for tokens in (30, 35, 50, 60) for finding in watch.see(0, "eval", {"sample_tokens": tokens})]
    assert found == [(50, "answers grow longer")]


def test_a_restart_that_has_read_the_log_says_nothing_twice():
    kind, change = ILLNESSES["loss rises"]
    first = health(kind, **USUAL[kind])
    assert findings(kind, change, 60, first)
    again = health(kind, **USUAL[kind])
    findings(kind, change, 60, again)
    again.told = first.told
    assert findings(kind, lambda step, m: change(step + 60, m), 60, again) == []
