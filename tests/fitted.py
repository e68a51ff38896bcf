"""Worker of test_fit.py, started by the deepspeed launcher: SFT where rank 1 may count on $LIMIT bytes only."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posttrain import fit, sft, shards
from posttrain.entry import main

usable, adapt = fit._usable, fit.adapt


def adapt_with_moments(training, run):
    masters, optimizer = shards._masters(training.engine)
    assert all(optimizer.state[master]["exp_avg_sq"].shape == master.shape for master in masters)
    adapt(training, run)


fit.adapt = adapt_with_moments
if os.environ["RANK"] == "1":
    fit._usable = lambda device: min(usable(device), float(os.environ["LIMIT"]))
main(sft.sft)
