"""Losses and the schedule against numbers worked out by hand, and the log-prob operator against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from posttrain import logprob
from posttrain.config import SFTRecipe
from posttrain.losses import PairLogps, dpo_loss, rewards
from posttrain.schedule import learning_rate


def pairs(chosen: list[float], rejected: list[float]) -> PairLogps:
    return PairLogps(torch.tensor(chosen), torch.tensor(rejected))


def test_dpo_loss_is_ln_2_where_policy_equals_reference():
    same = pairs([-5.0, -70.0], [-9.0, -1.0])
    for smoothing in (0.0, 0.2):
        assert dpo_loss(same, same, beta=0.3, label_smoothing=smoothing).tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_loss_on_literal_numbers():
    policy, reference = pairs([-4.0], [-8.0]), pairs([-5.0], [-6.0])
    margin = 0.5 * ((-4.0 - -8.0) - (-5.0 - -6.0))  # 1.5
    right, wrong = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
    assert dpo_loss(policy, reference, beta=0.5).item() == pytest.approx(right)
    assert dpo_loss(policy, reference, 0.5, label_smoothing=0.1).item() == pytest.approx(0.9 * right + 0.1 * wrong)
    assert [r.item() for r in rewards(policy, reference, 0.5)] == pytest.approx([0.5, -1.0])


def test_dpo_pushes_chosen_up_and_rejected_down():
    chosen, rejected = torch.tensor([-4.0], requires_grad=True), torch.tensor([-8.0], requires_grad=True)
    dpo_loss(PairLogps(chosen, rejected), pairs([-5.0], [-6.0]), beta=0.1).sum().backward()
    assert chosen.grad < 0 < rejected.grad


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


@pytest.mark.parametrize("rows", [0, 1, 7, 13])
def test_log_probs_equal_cross_entropy_in_value_and_gradient(monkeypatch, rows):
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", 3 * 37)  # three rows a chunk, a last one of another size
    torch.manual_seed(0)
    head = torch.nn.Linear(11, 37, bias=False)
    hidden = torch.randn(rows, 11, requires_grad=True)
    targets, weights = torch.randint(37, (rows,)), torch.randn(rows)
    expected = -F.cross_entropy(head(hidden), targets, reduction="none")
    grads = torch.autograd.grad((expected * weights).sum(), [hidden, head.weight])

    head.__class__ = logprob.LogProbHead
    actual = head(hidden, targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad((actual * weights).sum(), [hidden, head.weight]), grads)
    assert head(hidden).shape == (rows, 37)


def test_log_probs_of_bfloat16_are_float32():
    head = torch.nn.Linear(8, 16, bias=False, dtype=torch.bfloat16)
    head.__class__ = logprob.LogProbHead
    assert head(torch.randn(4, 8, dtype=torch.bfloat16), torch.arange(4)).dtype == torch.float32
