"""The plan: every example once an epoch, the same steps on any number of ranks, budgets kept."""

import numpy as np
import pytest

from posttrain.data.batches import largest_micro_batch, micro_batches, step_examples, steps_per_epoch

LENGTHS = np.random.RandomState(3).randint(2, 90, size=57)


def test_an_epoch_is_every_example_once_and_epochs_differ():
    steps = steps_per_epoch(57, 10)
    assert steps == 6
    first = np.concatenate([step_examples(57, 10, seed=5, step=step) for step in range(1, steps + 1)])
    second = np.concatenate([step_examples(57, 10, seed=5, step=step) for step in range(steps + 1, 2 * steps + 1)])
    assert sorted(first) == sorted(second) == list(range(57))
    assert list(first) != list(second)
    assert list(first) != list(step_examples(57, 57, seed=6, step=1))


def test_the_order_is_fixed_for_ever():
    assert step_examples(10, 4, seed=1337, step=1).tolist() == [3, 4, 5, 9]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [90, 200, 10_000])
def test_micro_batches_hold_every_example_once_within_the_budget(world_size, max_tokens):
    ranks = micro_batches(LENGTHS, max_tokens, world_size)
    assert len(ranks) == world_size
    assert len({len(bins) for bins in ranks}) == 1
    assert sorted(i for bins in ranks for part in bins for i in part) == list(range(57))
    assert all(LENGTHS[part].sum() <= max_tokens for bins in ranks for part in bins if part)


def test_ranks_carry_equal_loads():
    loads = [sum(int(LENGTHS[part].sum()) for part in bins) for bins in micro_batches(LENGTHS, 200, 4)]
    assert max(loads) - min(loads) < LENGTHS.max() / 2


def test_fewer_examples_than_ranks_leave_empty_micro_batches():
    assert micro_batches(np.array([5]), 10, 3) == [[[0]], [[]], [[]]]


def test_an_example_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="100 tokens does not fit into max_tokens_per_gpu=99"):
        micro_batches(np.array([5, 100]), 99, 1)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [100, 400, 5000])
def test_no_micro_batch_of_any_step_is_larger_than_the_one_tried_first(world_size, max_tokens, packing):
    largest = LENGTHS[largest_micro_batch(LENGTHS, 12, max_tokens, world_size, packing)].sum()
    assert largest <= max_tokens
    for step in range(1, 30):
        lengths = LENGTHS[step_examples(57, 12, seed=1, step=step)]
        for bins in micro_batches(lengths, max_tokens, world_size, packing):
            assert packing or max(map(len, bins)) <= 1
            assert all(lengths[part].sum() < largest + LENGTHS.min() for part in bins if part)
