"""Prepare preference pairs for posttrain/dpo.py.

python data_prep/prepare_dpo.py --dataset ultrafeedback --output_dir data/dpo
python data_prep/prepare_dpo.py --source pairs.jsonl --tokenizer runs/sft/final --output_dir data/mine
"""

from data_prep.prepare import main, prepare
from data_prep.sources import DPO_HUB, Pair, Refused, dpo_reader
from posttrain.chat import render_answer, render_prompt


def encode(tokenizer, pair: Pair, options) -> tuple[dict, str]:
    messages = pair.prompt
    if options.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    row = {
        "prompt": render_prompt(tokenizer, messages),
        "chosen": render_answer(tokenizer, pair.chosen),
        "rejected": render_answer(tokenizer, pair.rejected),
    }
    if len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) > options.max_length:
        raise Refused(f"prompt and longer answer exceed --max_length {options.max_length}")
    if row["chosen"] == row["rejected"]:
        raise Refused("chosen equals rejected once tokenized")
    return row, "\n".join(message["content"] for message in pair.prompt)


if __name__ == "__main__":
    main(lambda argv: prepare("dpo", DPO_HUB, dpo_reader, encode, argv))
