"""Prepare conversations (or plain documents) for posttrain/sft.py.

python data_prep/prepare_sft.py --dataset alpaca --output_dir data/sft
python data_prep/prepare_sft.py --source my.jsonl --tokenizer checkpoints/base --output_dir data/mine
python data_prep/prepare_sft.py --dataset alpaca:0.5 --dataset my.jsonl:2 --output_dir data/mix
"""

from data_prep.prepare import main, prepare

if __name__ == "__main__":
    main(lambda argv: prepare("sft", argv))
