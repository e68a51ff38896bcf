"""Supervised fine-tuning of a base model on conversations.

deepspeed --num_gpus 8 posttrain/sft.py [RECIPE.yaml] [--key=value ...]
python posttrain/sft.py ...                  the same on one device; --help lists every key
"""

import sys
from pathlib import Path

if __name__ == "posttrain.sft":
    raise ImportError("posttrain.sft is a function, `from posttrain import sft`; what this script runs is posttrain.training.command.sft")


def main() -> None:
    """Train by the recipe of the command line, on this rank."""
    from posttrain.training.command import sft

    sft()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    run_script(main)
