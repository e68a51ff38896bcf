"""Worker of test_fit.py and test_auto_layout.py: SFT where rank 1 may count only on the memory that it has at its start, and $MORE bytes.

With $UNCOUNTED the model is one whose activations the planner cannot count.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from posttrain.engine import shards
from posttrain.parallel.script import run_script
from posttrain.planning import planner
from posttrain.training import auto_batch
from posttrain.training.command import sft

usable, adapt = auto_batch.usable_bytes, auto_batch.adapt


def adapt_with_moments(training, run):
    masters, optimizer = shards.master_weights(training.engine)
    assert all(optimizer.state[master]["exp_avg_sq"].shape == master.shape for master in masters)
    adapt(training, run)


auto_batch.adapt = adapt_with_moments
if os.environ["RANK"] == "1":
    limit = max(1e6, psutil.Process().memory_info().rss + float(os.environ["MORE"]))
    auto_batch.usable_bytes = lambda device: min(usable(device), limit)
if os.environ.get("UNCOUNTED"):

    def count_working(*_, **__):
        raise ValueError("it looks at values")

    planner.count_working = count_working
run_script(sft)
