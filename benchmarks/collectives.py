"""Counts the bytes that a rank sends by collectives: for fake_world.py, and for the test of what the planner says of real ranks."""

from collections import Counter

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of the bytes given to a collective, in shares of (ranks - 1) / ranks, what each rank sends by the algorithms that need the least
SENT = {"allreduce": (0, 2), "allgather": (0, 1), "reduce_scatter": (1, 1), "broadcast": (0, 1), "reduce": (0, 1)}


class Counting(TorchDispatchMode):
    """Counts the collectives' bytes by name."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            if known := next((known for known in ("reduce_scatter", *SENT) if name.startswith(known)), None):
                argument, times = SENT[known]
                size = sum(leaf.nbytes for leaf in tree_leaves(args[argument]) if isinstance(leaf, Tensor))
                ranks = dist.ProcessGroup.unbox(next(one for one in args if isinstance(one, torch.ScriptObject))).size()
                self.sent[name] += times * size * (ranks - 1) / ranks
            else:
                assert name in ("barrier", "monitored_barrier"), name
        return function(*args, **(kwargs or {}))
