"""Prepare conversations (or plain documents) for posttrain/sft.py.

python data_prep/prepare_sft.py --dataset alpaca --output_dir data/sft
python data_prep/prepare_sft.py --source my.jsonl --tokenizer checkpoints/base --output_dir data/mine
"""

from data_prep.prepare import main, prepare
from data_prep.sources import SFT_HUB, Refused, sft_reader
from posttrain.chat import IGNORE, render, render_document


def encode(tokenizer, item, options) -> tuple[dict, str]:
    if isinstance(item, dict):
        if options.system_prompt:
            raise ValueError("--system_prompt has no place in plain documents (rows with a text column); leave it out")
        rendered, prompt = render_document(tokenizer, item["text"]), item["text"]
    else:
        if options.system_prompt and item[0]["role"] != "system":
            item = [{"role": "system", "content": options.system_prompt}, *item]
        if item[-1]["role"] != "assistant":
            raise Refused("the last message is not the assistant's")
        rendered, prompt = render(tokenizer, item), "\n".join(m["content"] for m in item if m["role"] == "user")
    if len(rendered.input_ids) > options.max_length:
        raise Refused(f"longer than --max_length {options.max_length}")
    trained = sum(label != IGNORE for label in rendered.labels[1:])
    if not trained:
        raise Refused("nothing to train on")
    return {"input_ids": rendered.input_ids, "labels": rendered.labels, "num_trained": trained}, prompt


if __name__ == "__main__":
    main(lambda argv: prepare("sft", SFT_HUB, sft_reader, encode, argv))
