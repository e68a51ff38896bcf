"""Direct Preference Optimization of an SFT checkpoint, against itself frozen as the reference.

deepspeed --num_gpus 8 posttrain/dpo.py [RECIPE.yaml] [--key=value ...]
python posttrain/dpo.py ...                  the same on one device; --help lists every key
"""

import sys
from pathlib import Path

if __name__ == "posttrain.dpo":
    raise ImportError("posttrain.dpo is a function, `from posttrain import dpo`; what this script runs is posttrain.training.command.dpo")


def main() -> None:
    """Train by the recipe of the command line, on this rank."""
    from posttrain.training.command import dpo

    dpo()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    run_script(main)
