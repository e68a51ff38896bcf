"""Prepare preference pairs for posttrain/dpo.py.

python data_prep/prepare_dpo.py --dataset ultrafeedback --output_dir data/dpo
python data_prep/prepare_dpo.py --source pairs.jsonl --tokenizer runs/sft/final --output_dir data/mine
"""

from data_prep.prepare import main, prepare

if __name__ == "__main__":
    main(lambda argv: prepare("dpo", argv))
