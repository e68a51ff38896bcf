"""Measures the base, SFT and DPO models on held-out prompts: prints a table, writes results.json and results.png.

    python launch/quickstart/measure.py --base DIR --sft DIR --dpo DIR --eval eval.json --out_dir runs/quickstart

Each DIR is a Hugging Face folder; eval.json is what world.py writes. Answers are generated greedily in float32 and compared
letter by letter (world.score), so the same weights give the same table. Intervals are 95 % Wilson intervals: they cover the
choice of prompts, not that of the training seed.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import world  # beside this script, which puts its own folder on the path
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.data.chat import ChatFormat, render_prompt
from posttrain.evaluation.compare import Rate, wilson
from posttrain.run import charts

MODELS = ("base", "sft", "dpo")
MEANING = {
    "follows_instructions": "plays a word game (repeat, reverse, first, last) on unseen words, every letter right",
    "stops": "ends its answer by itself with <|im_end|>, on all prompts",
    "known_facts": "answers rightly about people of the corpus whom neither SFT nor DPO asked about",
    "made_up": "anything but an admission of not knowing, about people who do not exist (lower is better)",
    "polite": "opens politely, on word games and known people",
}
TOKEN_LIMIT, BATCH, SAMPLES = 40, 128, 5


class Answer(NamedTuple):
    """A generated answer."""

    text: str  # before <|im_end|>; special tokens that come earlier stay visible and make it wrong
    stopped: bool


@torch.inference_mode()
def answer_all(folder: Path, prompts: list[str]) -> dict[str, Answer]:
    """Greedy answers of one model, by prompt. Only prompts of equal length share a batch, so padding cannot change an answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    chat = ChatFormat(tokenizer)
    end, end_of_text = chat.end_id, tokenizer.eos_token_id
    ids = {prompt: render_prompt(chat, [{"role": "user", "content": prompt}]) for prompt in prompts}
    answers = {}
    for batch in _batches(ids):
        width = max(len(ids[prompt]) for prompt in batch)
        rows = torch.tensor([[end] * (width - len(ids[prompt])) + ids[prompt] for prompt in batch])
        mask = torch.tensor([[0] * (width - len(ids[prompt])) + [1] * len(ids[prompt]) for prompt in batch])
        made = model.generate(
            rows, attention_mask=mask, max_new_tokens=TOKEN_LIMIT, do_sample=False, eos_token_id=[end, end_of_text], pad_token_id=end
        )
        for prompt, tokens in zip(batch, made[:, width:].tolist(), strict=True):
            cut = next((at for at, token in enumerate(tokens) if token in (end, end_of_text)), len(tokens))
            answers[prompt] = Answer(tokenizer.decode(tokens[:cut]), tokens[cut : cut + 1] == [end])
    return answers


def _batches(ids: dict[str, list[int]]) -> list[list[str]]:
    """Group prompts of equal length, at most BATCH together; `ids` are the tokens of each."""
    by_length = defaultdict(list)
    for prompt, tokens in ids.items():
        by_length[len(tokens)].append(prompt)
    return [group[i : i + BATCH] for _, group in sorted(by_length.items()) for i in range(0, len(group), BATCH)]


def rates(prompts: dict[str, list[dict]], answers: dict[str, Answer]) -> dict[str, Rate]:
    """The share of answers that count for each metric, with its interval."""
    result = {}
    for metric, items in prompts.items():
        given = [(item, answers[item["prompt"]]) for item in items]
        result[metric] = wilson(sum(world.score(metric, item, answer.text, answer.stopped) for item, answer in given), len(items))
    return result


def table(results: dict[str, dict[str, Rate]]) -> str:
    """The results as text; `results` holds rates by model and metric."""
    lines = [f"{'':<22}" + "".join(f"{model:>24}" for model in MODELS) + f"{'prompts':>9}"]
    for metric, meaning in MEANING.items():
        cells = [results[model][metric] for model in MODELS]
        shown = "".join(f"{f'{r.value:6.1%} [{r.low:6.1%}, {r.high:6.1%}]':>24}" for r in cells)
        lines += [f"{metric:<22}{shown}{cells[0].n:>9}", f"    {meaning}"]
    return "\n".join([*lines, "", "in brackets: 95 % intervals"])


def samples(prompts: dict[str, list[dict]], answers: dict[str, dict[str, Answer]]) -> str:
    """Some prompts with the answers of every model, as text."""
    lines = []
    for items in (prompts["follows_instructions"][:2], prompts["known_facts"][:2], prompts["made_up"][:1]):
        for item in items:
            lines.append(f"> {item['prompt']}")
            lines += [f"    {model:<5}{answers[model][item['prompt']].text!r}" for model in MODELS]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for model in MODELS:
        parser.add_argument(f"--{model}", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--eval", type=Path, required=True, help="eval.json, written by world.py")
    parser.add_argument("--out_dir", type=Path, required=True)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    prompts = json.loads(arguments.eval.read_text(encoding="utf-8"))
    every = sorted({item["prompt"] for items in prompts.values() for item in items})
    answers = {model: answer_all(getattr(arguments, model), every) for model in MODELS}
    results = {model: rates(prompts, answers[model]) for model in MODELS}
    better_low = {"made_up": {"lower_is_better": True}}
    plain = {
        model: {metric: rate._asdict() | better_low.get(metric, {}) for metric, rate in cells.items()} for model, cells in results.items()
    }
    (arguments.out_dir / "results.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    figure = charts.bars("What SFT and DPO are each for, on prompts never trained on", plain)
    charts.save_png(figure, arguments.out_dir / "results.png")
    print(samples(prompts, answers), table(results), sep="\n\n")


if __name__ == "__main__":
    main()
