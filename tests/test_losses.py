"""Losses and the schedule against numbers worked out by hand, and the log-prob operator against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from posttrain.objectives.losses import LOSSES, PairLogps, rewards
from posttrain.operators import logprob
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe
from posttrain.training.schedule import learning_rate, with_warmup

OPTIONS = {"beta": 0.5, "label_smoothing": 0.1, "simpo_gamma": 0.7}
LENGTHS = PairLogps(torch.tensor([4.0, 10.0, 1.0]), torch.tensor([8.0, 2.0, 3.0]))


def pairs(chosen: list[float], rejected: list[float]) -> PairLogps:
    return PairLogps(torch.tensor(chosen, requires_grad=True), torch.tensor(rejected, requires_grad=True))


POLICY, REFERENCE = pairs([-4.0, -30.0, -0.4], [-8.0, -2.0, -9.0]), pairs([-5.0, -26.0, -0.9], [-6.0, -5.0, -9.5])


def plainly(name: str, pc: float, pr: float, rc: float, rr: float, nc: float, nr: float, b: float, e: float, g: float) -> float:
    """One pair's loss in plain Python, from the papers and not from the code: policy and reference log-probs and token counts of chosen
    and rejected; beta, label smoothing, SimPO's gamma."""

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    dc, dr = pc - rc, pr - rr
    if name == "sigmoid":
        return -(1 - e) * math.log(sigma(b * (dc - dr))) - e * math.log(1 - sigma(b * (dc - dr)))
    if name == "robust":
        clean, flipped = -math.log(sigma(b * (dc - dr))), -math.log(sigma(b * (dr - dc)))
        return ((1 - e) * clean - e * flipped) / (1 - 2 * e)
    if name == "hinge":
        return max(0.0, 1 - b * (dc - dr))
    if name == "ipo_sum":
        return (dc - dr - 1 / (2 * b)) ** 2
    if name == "ipo_mean":
        return (dc / nc - dr / nr - 1 / (2 * b)) ** 2
    if name == "sigmoid_norm":
        return -math.log(sigma(b * pc / nc - b * rc / nc - b * pr / nr + b * rr / nr))
    if name == "exo_pair":  # KL(p || q) of two-point distributions
        p = sigma(b * (dc - dr))
        return p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e)
    if name == "nca_pair":
        return -math.log(sigma(b * dc)) - 0.5 * math.log(sigma(-b * dc)) - 0.5 * math.log(sigma(-b * dr))
    if name == "sppo_hard":
        return (dc - 1 / (2 * b)) ** 2 + (dr + 1 / (2 * b)) ** 2
    if name == "apo_zero":
        return 1 - sigma(b * dc) + sigma(b * dr)
    if name == "apo_down":
        return sigma(b * dc) + 1 - sigma(b * (dc - dr))
    if name == "simpo":
        return -math.log(sigma(b / nc * pc - b / nr * pr - g))
    if name == "orpo":
        odds = [math.exp(logp / n) / (1 - math.exp(logp / n)) for logp, n in ((pc, nc), (pr, nr))]
        return -pc / nc - b * math.log(sigma(math.log(odds[0] / odds[1])))
    raise AssertionError(name)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_its_papers_equation_on_literal_numbers(name):
    columns = [column.tolist() for pair in (POLICY, REFERENCE, LENGTHS) for column in pair]
    expected = [plainly(name, *row, *OPTIONS.values()) for row in zip(*columns, strict=True)]
    assert LOSSES[name](POLICY, REFERENCE, LENGTHS, OPTIONS).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].at_start])
def test_a_loss_starts_at_its_closed_form_value(name):
    options = {key: value for key, value in OPTIONS.items() if key in LOSSES[name].reads}
    value = LOSSES[name].at_start(**options)
    assert LOSSES[name](POLICY, POLICY, LENGTHS, OPTIONS).tolist() == pytest.approx([value] * 3)
    table = {"hinge": 1, "ipo_sum": 1, "ipo_mean": 1, "nca_pair": 1.386294, "sppo_hard": 2, "apo_zero": 1, "apo_down": 1}
    table["exo_pair"] = -math.log(2) - 0.5 * math.log(0.9) - 0.5 * math.log(0.1)
    assert value == pytest.approx(table.get(name, 0.693147), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_pushes_the_chosen_answer_over_the_rejected_one(name):
    """At the start, and for a pair that the policy has wrong (where apo_down, true to its paper, lowers the chosen answer further)."""
    for policy in (REFERENCE, POLICY) if name != "apo_down" else (REFERENCE,):
        chosen, rejected = (x.detach().clone().requires_grad_() for x in policy)
        LOSSES[name](PairLogps(chosen, rejected), REFERENCE, LENGTHS, OPTIONS).sum().backward()
        assert chosen.grad[1] < rejected.grad[1]  # descent moves chosen up relative to rejected
        assert rejected.grad[1] > 0
        assert chosen.grad[1] < 0 or name == "apo_down"
    if name == "apo_down":  # both fall, the chosen one not at first
        chosen, rejected = (x.detach().clone().requires_grad_() for x in REFERENCE)
        LOSSES[name](PairLogps(chosen, rejected), REFERENCE, LENGTHS, OPTIONS).sum().backward()
        assert chosen.grad.abs().max() < 1e-6 < rejected.grad.min()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_stays_finite_far_out_and_in_its_gradient(name):
    chosen, rejected = (torch.tensor([v, w], requires_grad=True) for v, w in ((-1e-9, -4000.0), (-4000.0, 0.0)))
    lengths = PairLogps(torch.tensor([1.0, 900.0]), torch.tensor([900.0, 1.0]))
    losses = LOSSES[name](PairLogps(chosen, rejected), pairs([-2000.0, -1.0], [-1.0, -2000.0]), lengths, OPTIONS)
    losses.sum().backward()
    assert all(torch.isfinite(x).all() for x in (losses, chosen.grad, rejected.grad))


def test_what_each_loss_reads_is_its_signature():
    always = {"policy", "beta"}
    assert LOSSES["sigmoid"].reads == always | {"reference", "label_smoothing"}
    assert LOSSES["simpo"].reads == always | {"lengths", "simpo_gamma"}
    assert all(always <= loss.reads for loss in LOSSES.values())
    changed = OPTIONS | {"label_smoothing": 0.3, "simpo_gamma": 0.1}
    for name, loss in LOSSES.items():
        same = torch.equal(loss(POLICY, REFERENCE, LENGTHS, OPTIONS), loss(POLICY, REFERENCE, LENGTHS, changed))
        assert same != bool(loss.reads & {"label_smoothing", "simpo_gamma"}), name


def test_a_uniform_reference_cancels_out_exactly_where_a_loss_is_of_the_margin():
    shifted = PairLogps(REFERENCE.chosen + 3, REFERENCE.rejected + 3)
    per_token = PairLogps(REFERENCE.chosen + 3 * LENGTHS.chosen, REFERENCE.rejected + 3 * LENGTHS.rejected)
    for name, loss in LOSSES.items():
        if "reference" in loss.reads:
            other = per_token if "lengths" in loss.reads else shifted
            unmoved = torch.allclose(loss(POLICY, REFERENCE, LENGTHS, OPTIONS), loss(POLICY, other, LENGTHS, OPTIONS), atol=1e-5)
            assert unmoved == loss.is_of_the_margin, name


def test_rewards():
    assert rewards(POLICY, REFERENCE, LENGTHS, 0.5).chosen.tolist() == pytest.approx([0.5, -2.0, 0.25])
    assert rewards(POLICY, None, LENGTHS, 0.5).rejected.tolist() == pytest.approx([-0.5, -0.5, -1.5])


def test_learning_rate_at_the_corners():
    values = {"checkpoint_path": "b", "sft_data_dir": "d", "out_dir": "r", "max_iters": 100, "global_batch_size": 8}
    recipe = SFTRecipe(**values, learning_rate=1.0, min_lr=0.1, warmup_iters=9)
    assert [learning_rate(recipe, step, 109) for step in (1, 9)] == pytest.approx([0.1, 0.9])
    assert learning_rate(recipe, 10, 109) == 1.0  # the peak is reached
    assert learning_rate(recipe, 60, 109) == pytest.approx(0.55)  # half of the cosine
    assert 0.1 < learning_rate(recipe, 109, 109) < 0.101  # the last step still trains
    assert learning_rate(recipe, 110, 109) == learning_rate(recipe, 500, 109) == 0.1
    assert learning_rate(recipe.model_copy(update={"lr_decay_iters": 59}), 60, 109) == 0.1
    assert learning_rate(recipe.model_copy(update={"warmup_iters": 0, "min_lr": 0.0}), 1, 1) == 1.0  # a run of one step
    held = recipe.model_copy(update={"decay_lr": False})
    assert [learning_rate(held, step, 109) for step in (1, 60, 109)] == pytest.approx([0.1, 1.0, 1.0])


def test_a_share_of_the_steps_as_warmup(tmp_path):
    values = {"checkpoint_path": "b", "sft_data_dir": "d", "out_dir": str(tmp_path), "max_iters": 100, "global_batch_size": 8}
    recipe = build_recipe(SFTRecipe, values | {"warmup_ratio": 0.5, "lr_decay_iters": 40}, {})
    assert with_warmup(recipe, 70).warmup_iters == 35
    with pytest.raises(ValueError, match="lr_decay_iters 40 is not after warmup_iters 40"):
        with_warmup(recipe, 79)
    (tmp_path / "run.json").write_text('{"warmup_iters": 7}')
    assert with_warmup(recipe, 100).warmup_iters == 7  # as it was when the run began


@pytest.mark.parametrize("rows", [0, 1, 7, 13])
def test_log_probs_equal_cross_entropy_in_value_and_gradient(rows):
    torch.manual_seed(0)
    head = torch.nn.Linear(11, 37, bias=False)
    hidden = torch.randn(rows, 11, requires_grad=True)
    targets, weights = torch.randint(37, (rows,)), torch.randn(rows)
    expected = -F.cross_entropy(head(hidden), targets, reduction="none")
    grads = torch.autograd.grad((expected * weights).sum(), [hidden, head.weight])

    head.__class__ = logprob.LogProbHead
    head.way = logprob.Way(piece=3 * 37)  # three rows, a last piece of another size
    actual = head(hidden, targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad((actual * weights).sum(), [hidden, head.weight]), grads)
    assert head(hidden).shape == (rows, 37)


def test_gradients_of_bfloat16_do_not_depend_on_the_pieces():
    """300 rows add up in float32, however few logits are held at a time; sums in bfloat16 would be off."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16).bfloat16().requires_grad_(), torch.randn(64, 16).bfloat16().requires_grad_()
    targets = torch.randint(64, (300,))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(-F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum"), exact)
    for held in (2**26, 300 * 7, 50):
        actual = torch.autograd.grad(logprob.token_logps(hidden, weight, targets, logprob.Way(piece=held)).sum(), (hidden, weight))
        for mine, right in zip(actual, expected, strict=True):
            assert (mine - right).norm() / right.norm() < 5e-3, held


def test_log_probs_of_bfloat16_are_float32():
    head = torch.nn.Linear(8, 16, bias=False, dtype=torch.bfloat16)
    head.__class__ = logprob.LogProbHead
    assert head(torch.randn(4, 8, dtype=torch.bfloat16), torch.arange(4)).dtype == torch.float32
