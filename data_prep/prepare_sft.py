"""Prepare conversations (or plain documents) for posttrain/sft.py.

python data_prep/prepare_sft.py --dataset alpaca --tokenizer checkpoints/base --output_dir data/sft
python data_prep/prepare_sft.py --source my.jsonl --tokenizer checkpoints/base --output_dir data/mine
python data_prep/prepare_sft.py --dataset alpaca:0.5 --dataset my.jsonl:2 --tokenizer checkpoints/base --output_dir data/mix
"""

import sys
from pathlib import Path


def main() -> None:
    """Prepare as the command line asks."""
    from data_prep.options import run

    run("sft")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder with posttrain in it, which need not be installed
    from posttrain.parallel.script import run_script

    run_script(main)
