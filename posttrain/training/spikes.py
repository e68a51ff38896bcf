"""Steps that must not be applied: a loss or gradient that is not finite, or a gradient norm far above what the run has seen.

Such a step leaves weights and optimizer as they were, the run says so and records the step's examples in bad_batches.jsonl, and goes on;
three in a row stop it.
"""

import math
from collections import deque
from statistics import median

REMEMBERED = 50  # gradient norms of applied steps
FEWEST = 20  # before these there is no median to speak of
IN_A_ROW = 3  # bad steps that stop a run


class StepGuard:
    """Judges gradient norms by the run's own. The same on all ranks, since what it sees is reduced over them."""

    def __init__(self, skip_spikes: float):
        """A norm is a spike above `skip_spikes` times the median, and above all that were applied.

        (Where a model has learnt its data by heart the median is tiny, and every batch with something new in it would be a spike.)
        """
        self.factor, self.highest = skip_spikes, 0.0
        self.norms: deque[float] = deque(maxlen=REMEMBERED)
        self.bad_in_a_row = self.last_applied = 0

    @property
    def largest_norm(self) -> float:
        """A gradient norm above this is a spike."""
        if not self.factor or len(self.norms) < FEWEST:
            return math.inf
        typical = median(self.norms)
        return max(self.factor * typical, self.highest) if typical else math.inf  # 0, as the hinge loss may have, is no measure

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why the step must not be applied, or was not; None for a good one."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if grad_norm > self.largest_norm:
            typical = median(self.norms)
            return f"the gradient norm {grad_norm:.4g} is more than {self.factor:g} times {typical:.4g}, the median of the last steps"
        return None

    def count(self, step: int, reason: str | None, grad_norm: float) -> None:
        """Take note of a step."""
        if reason:
            self.bad_in_a_row += 1
        else:
            self.bad_in_a_row, self.last_applied = 0, step
            self.norms.append(grad_norm)
            self.highest = max(self.highest, grad_norm)

    @property
    def must_stop(self) -> bool:
        return self.bad_in_a_row >= IN_A_ROW

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"norms": list(self.norms), "highest": self.highest, "bad_in_a_row": self.bad_in_a_row, "last_applied": self.last_applied}

    def restore(self, state: dict) -> None:
        self.norms.extend(state["norms"])
        self.highest = state.get("highest", 0.0)  # checkpoints from before it was kept have none
        self.last_applied = state["last_applied"]
        self.bad_in_a_row = state["bad_in_a_row"] % IN_A_ROW  # going on after a stop begins to count anew
