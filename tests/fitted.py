"""Worker of test_fit.py, started by the deepspeed launcher: SFT where rank 1 may count on $LIMIT bytes only."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posttrain import fit, sft
from posttrain.run import main

usable = fit._usable
if os.environ["RANK"] == "1":
    fit._usable = lambda device: min(usable(device), float(os.environ["LIMIT"]))
main(sft.sft)
