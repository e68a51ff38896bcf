"""When a step is refused, from numbers alone."""

import math

from posttrain.training.spikes import FEWEST, StepGuard


def after(norms: list[float], factor: float = 20.0) -> StepGuard:
    guard = StepGuard(factor)
    for step, norm in enumerate(norms, start=1):
        guard.count(step, guard.judge(1.0, norm), norm)
    return guard


def test_a_spike_is_judged_by_the_median_of_enough_good_steps():
    assert after([1.0] * (FEWEST - 1)).judge(1.0, 1e9) is None  # too few to speak of a median
    guard = after([1.0] * FEWEST)
    assert guard.judge(1.0, 19.9) is None
    assert guard.judge(1.0, 20.1) == "the gradient norm 20.1 is more than 20 times 1, the median of the last steps"
    assert after([1.0] * FEWEST, factor=0).judge(1.0, 1e9) is None


def test_a_refused_step_is_no_measure_for_later_ones():
    guard = after([1.0] * FEWEST + [1e6] * 2)
    assert guard.largest_norm == 20.0
    assert (guard.bad_in_a_row, guard.last_applied, guard.must_stop) == (2, FEWEST, False)
    guard.count(FEWEST + 3, guard.judge(1.0, 1e6), 1e6)
    assert guard.must_stop


def test_what_is_not_finite_is_refused_from_the_first_step_on():
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)):
        assert "inf" in (reason := StepGuard(0).judge(loss, norm)) or "nan" in reason


def test_a_median_of_zero_refuses_nothing():
    """The hinge loss has gradients of exactly 0 once all pairs are apart by more than its margin."""
    guard = after([1.0] * 5 + [0.0] * 30)
    assert guard.judge(1.0, 1e-6) is None


def test_what_the_run_has_seen_before_is_no_spike():
    """A model that knows its data by heart has tiny gradients, until a batch has something new in it."""
    guard = after([0.9, 0.5] + [0.002] * 60)
    assert guard.judge(1.0, 0.89) is None
    assert guard.judge(1.0, 0.91) == "the gradient norm 0.91 is more than 20 times 0.002, the median of the last steps"


def test_a_guard_goes_on_after_a_resume_as_if_nothing_had_been():
    before = after([1.0, 2.0] * FEWEST + [1e6])
    resumed = StepGuard(20.0)
    resumed.restore(before.state())
    assert resumed.highest == before.highest == 2.0
    assert (resumed.largest_norm, resumed.bad_in_a_row, resumed.last_applied) == (before.largest_norm, 1, 2 * FEWEST)
    stopped = after([1.0] * FEWEST + [1e6] * 3)
    resumed = StepGuard(20.0)
    resumed.restore(stopped.state())
    assert resumed.bad_in_a_row == 0  # three more are needed to stop it again
