"""Worker of test_gpu_paths.py: SFT on two ranks, of which one may take no more memory from step 2 on; what fails is a real allocation."""

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from posttrain.parallel.script import run_script
from posttrain.training import loop
from posttrain.training.command import sft

train_step = loop.train_step


def starve(training, step, questions):
    if os.environ["RANK"] == "1" and step == 2:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**20,) * 2)
    return train_step(training, step, questions)


loop.train_step = starve
run_script(sft)
