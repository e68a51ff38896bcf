"""Prepare preference pairs for posttrain/dpo.py.

python data_prep/prepare_dpo.py --dataset ultrafeedback --tokenizer runs/sft/final --output_dir data/dpo
python data_prep/prepare_dpo.py --source pairs.jsonl --tokenizer runs/sft/final --output_dir data/mine
"""

import sys
from pathlib import Path


def main() -> None:
    """Prepare as the command line asks."""
    from data_prep.options import run

    run("dpo")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    run_script(main)
