"""Measure preferences: of a judge between two checkpoints' answers, or of a checkpoint between the answers of held-out pairs.

    python posttrain/eval_preferences.py --checkpoint runs/sft --checkpoint runs/dpo --prompts FILE --judge http://HOST/v1 --judge_model M
        both answer every prompt of FILE (a prompt a line), greedily; any OpenAI-compatible judge compares them in both orders
    python posttrain/eval_preferences.py --checkpoint runs/dpo --reference runs/sft --pairs data/dpo
        how often the policy has come to prefer the chosen answer of the held-out pairs, against its reference

The judge's key is read from OPENAI_API_KEY. Every prompt, answer and verdict is kept in --output.
"""

import argparse
import asyncio
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from posttrain.common import files, terminal
from posttrain.common.files import read_prompts
from posttrain.data.chat import render_prompt
from posttrain.data.prepared import load_prepared
from posttrain.data.tokenization import fingerprint
from posttrain.evaluation.compare import p_value, rate
from posttrain.evaluation.judge import Judgement, judge
from posttrain.evaluation.pairs import margins
from posttrain.model import assistant
from posttrain.model.assistant import Assistant
from posttrain.model.command_line import add_checkpoint_options, dtype_on, parse, places_by_name
from posttrain.parallel.script import run_script
from posttrain.serving.batching import Batcher
from posttrain.serving.sampling import Sampling

LONGEST = 512  # tokens of an answer, where --max_tokens is not given


def evaluate() -> None:
    """Read the command line, and measure a win rate or a reward accuracy."""
    parser = argparse.ArgumentParser(prog="eval_preferences.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line")
    parser.add_argument("--judge", metavar="URL", help="of an OpenAI-compatible endpoint, with /v1")
    parser.add_argument("--judge_model", metavar="M")
    parser.add_argument("--reference", metavar="[NAME=]DIR", help="what the policy was trained against")
    parser.add_argument(
        "--pairs", type=Path, metavar="DIR", help="data prepared by data_prep/prepare_dpo.py; its validation rows are taken"
    )
    parser.add_argument("--max_samples", type=int, metavar="N", help="the first N prompts or pairs only")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="longest answer to a prompt (512)")
    parser.add_argument("--output", type=Path, default=Path("runs/preferences"), metavar="DIR", help="(runs/preferences)")
    options = parse(parser, max_samples=1, max_tokens=1)
    by_judge = (options.prompts, options.judge, options.judge_model)
    by_pairs = (options.reference, options.pairs)
    if all(by_judge) and not any(by_pairs) and len(options.checkpoint) == 2:
        _win_rate(options)
    elif all(by_pairs) and not any(by_judge) and len(options.checkpoint) == 1:
        _reward_accuracy(options)
    else:
        raise ValueError(
            "give either two --checkpoint with --prompts, --judge and --judge_model, or one --checkpoint with --reference and --pairs"
        )


def _load(options: argparse.Namespace, given: list[str]) -> list[Assistant]:
    """Load checkpoints given as [NAME=]DIR, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = places_by_name(given, options.tokenizer)
    dtype = dtype_on(device, options.dtype)
    return [assistant.load(place, name, options.tokenizer, dtype, device) for name, place in places.items()]


def _win_rate(options: argparse.Namespace) -> None:
    """Measure how often the judge prefers the answer of the first checkpoint to that of the second."""
    files.refuse_existing(options.output, "win_rate.json")
    names, found, refusals = _judged_answers(options)
    scores = [one.score for one in found if one.score is not None]
    if not scores:
        raise ValueError(f"{options.judge_model} gave no verdict that could be read, [[A]], [[B]] or [[C]], to any of {len(found)} prompts")
    result, unread = rate(scores), len(found) - len(scores)
    decided = [score for score in scores if score != 0.5]
    p = p_value([1 - score for score in decided], decided) if decided else 1.0
    swapped = sum(one.depends_on_order for one in found)
    facts = {"win_rate": result._asdict(), "p": p, "unread": unread, "depends_on_order": swapped, "of": names}
    files.write_whole(options.output / "win_rate.json", json.dumps(facts, indent=2) + "\n")
    sure = f"p = {p:.2g}" if p < 0.05 else f"not distinguishable from even (p = {p:.2g})"
    span = f"{100 * result.low:.1f} to {100 * result.high:.1f}"
    terminal.say(
        f"{names[0]} wins against {names[1]}: {100 * result.value:.1f} % ({span}) of {result.n}, ties as halves; {sure}\n"
        f"the order of the answers decided {swapped} times; {unread} prompts have no verdict that could be read"
    )
    if refusals:
        terminal.say(f"note: the judge refused {len(refusals)} of {2 * len(found)} questions, the first one with {refusals[0]}")


def _judged_answers(options: argparse.Namespace) -> tuple[list[str], list[Judgement], list[str]]:
    """Let both checkpoints answer every prompt and the judge compare the answers; keep all in win_rate.jsonl.

    Returns the checkpoints' names, a judgement for each prompt, and the reasons of questions that the judge refused.
    """
    prompts = read_prompts(options.prompts, options.max_samples)
    ask = partial(judge, options.judge, options.judge_model, os.environ.get("OPENAI_API_KEY"))
    asyncio.run(ask([("Say yes.", "yes", "no")]))  # finds a wrong address or key before anything is generated
    models = _load(options, options.checkpoint)
    for one in models:
        if one.chat is None:
            raise ValueError(f"{one.name} cannot be asked: {one.why_no_chat}")
    first, second = (asyncio.run(_answers(one, prompts, options.max_tokens or LONGEST)) for one in models)
    names, asked = [one.name for one in models], list(zip(prompts, first, second, strict=True))
    rows = [{"prompt": prompt, names[0]: a, names[1]: b} for prompt, a, b in asked]
    _write(options.output / "win_rate.jsonl", rows)  # answers take longest, and the judge may fail
    found, refusals = asyncio.run(ask(asked))
    judged = [row | {"verdicts": [one.forward, one.backward], "score": one.score} for row, one in zip(rows, found, strict=True)]
    _write(options.output / "win_rate.jsonl", judged)
    return names, found, refusals


async def _answers(one: Assistant, prompts: list[str], most: int) -> list[str]:
    """Return the greedy answers of one checkpoint to prompts, of `most` tokens at most, many generated at once.

    Raises ValueError for a prompt that leaves no room for an answer.
    """
    batcher = Batcher(one, 32, models=2)
    batcher.start()
    system = [{"role": "system", "content": one.system_prompt}] if one.system_prompt else []
    gate = asyncio.Semaphore(64)

    async def answer(text: str) -> str:
        ids = render_prompt(one.chat, [*system, {"role": "user", "content": text}])
        if len(ids) >= one.context:
            raise ValueError(f"a prompt has {len(ids):,} tokens; {one.name} reads {one.context:,}: {text[:60]!r} ...")
        async with gate:
            made = batcher.generate(ids, Sampling(min(most, one.context - len(ids)), 0.0), 3600)
            tokens = [token async for new in made for token in new]
        return one.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    try:
        return await asyncio.gather(*[answer(text) for text in prompts])
    finally:
        batcher.stop()


def _reward_accuracy(options: argparse.Namespace) -> None:
    """Measure how often the policy prefers the chosen answer of a pair more than its reference does."""
    if options.max_tokens:
        raise ValueError("--max_tokens is for answers to --prompts; with --pairs nothing is generated")
    files.refuse_existing(options.output, "reward_accuracy.json")
    prepared = load_prepared(str(options.pairs), "dpo", "python data_prep/prepare_dpo.py")
    policy, reference = _load(options, [*options.checkpoint, options.reference])
    for one in (policy, reference):
        if fingerprint(one.tokenizer) != prepared.manifest["tokenizer"]:
            raise ValueError(f"{options.pairs} was prepared with another tokenizer than {one.name}'s; prepare it again with --tokenizer")
    table = prepared.validation
    rows = [table[index] for index in range(min(len(table), options.max_samples or len(table)))]
    if not rows:
        raise ValueError(f"{options.pairs} has no validation rows: prepare it with --val_size")
    found = margins(policy.model, reference.model, rows)
    _write(options.output / "pairs.jsonl", [{"pair": i, **one._asdict(), "score": one.score} for i, one in enumerate(found)])
    result = rate([one.score for one in found])
    mean = sum(one.chosen - one.rejected for one in found) / len(found)
    facts = {"reward_accuracy": result._asdict(), "mean_margin_nats": mean, "policy": policy.name, "reference": reference.name}
    files.write_whole(options.output / "reward_accuracy.json", json.dumps(facts, indent=2) + "\n")
    terminal.say(
        f"{policy.name} prefers the chosen answer more than {reference.name} does in {100 * result.value:.1f} % "
        f"({100 * result.low:.1f} to {100 * result.high:.1f}) of {result.n} pairs; mean margin {mean:.3f} nats (times beta: the reward)"
    )


def _write(path: Path, rows: list[dict]) -> None:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run_script(evaluate)
