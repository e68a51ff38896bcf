"""Finds steps that must not be applied: loss or gradient are not finite, or the gradient norm is far above all that the run has seen.

Such a step leaves weights and optimizer as they were. The run says so, records the step's examples in bad_batches.jsonl, and goes on;
three such steps in a row stop it.
"""

import math
from collections import deque
from statistics import median

REMEMBERED = 50  # applied steps whose gradient norms the median is of
FEWEST = 20  # with fewer such norms nothing is a spike
IN_A_ROW = 3  # bad steps that stop a run


class StepGuard:
    """Judges a step by the run's earlier gradient norms. All ranks judge alike, since loss and norm are reduced over them."""

    def __init__(self, skip_spikes: float):
        """A norm is a spike if it is above `skip_spikes` times the median and above every norm that was applied; 0 turns this off.

        The median alone would not do: it is tiny once a model knows its data by heart, and any batch with something new would be a spike.
        """
        self.factor, self.highest = skip_spikes, 0.0
        self.norms: deque[float] = deque(maxlen=REMEMBERED)
        self.bad_in_a_row = self.last_applied = 0

    @property
    def largest_norm(self) -> float:
        """The gradient norm above which a step is a spike; infinite if none is."""
        if not self.factor or len(self.norms) < FEWEST:
            return math.inf
        typical = median(self.norms)
        return max(self.factor * typical, self.highest) if typical else math.inf  # 0, as the hinge loss may have, is no measure

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Return why a step must not be applied, None for a good one."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if grad_norm > self.largest_norm:
            typical = median(self.norms)
            return f"the gradient norm {grad_norm:.4g} is more than {self.factor:g} times {typical:.4g}, the median of the last steps"
        return None

    def count(self, step: int, reason: str | None, grad_norm: float) -> None:
        """Remember a step; `reason` is why it was not applied, None if it was."""
        if reason:
            self.bad_in_a_row += 1
        else:
            self.bad_in_a_row, self.last_applied = 0, step
            self.norms.append(grad_norm)
            self.highest = max(self.highest, grad_norm)

    @property
    def must_stop(self) -> bool:
        """Whether too many steps in a row were not applied for the run to go on."""
        return self.bad_in_a_row >= IN_A_ROW

    def state(self) -> dict:
        """Return what a checkpoint keeps of it."""
        return {"norms": list(self.norms), "highest": self.highest, "bad_in_a_row": self.bad_in_a_row, "last_applied": self.last_applied}

    def restore(self, state: dict) -> None:
        """Take over what `state` returned."""
        self.norms.extend(state["norms"])
        self.highest = state.get("highest", 0.0)  # older checkpoints do not have it
        self.last_applied = state["last_applied"]
        self.bad_in_a_row = state["bad_in_a_row"] % IN_A_ROW  # a run that was stopped by them counts anew
