"""Measures preferences: of a judge between two checkpoints' answers, or of a checkpoint between the answers of held-out pairs.

posttrain/eval_preferences.py is the command.
"""

import argparse
import asyncio
import json
import os
from functools import partial
from pathlib import Path

from posttrain.common import files, gpus, places, terminal
from posttrain.common.files import read_prompts
from posttrain.data.chat import render_prompt
from posttrain.data.prepared import load_prepared
from posttrain.data.row_checks import check_rows
from posttrain.data.tokenization import fingerprint
from posttrain.evaluation.compare import p_value, rate
from posttrain.evaluation.judge import Judgement, judge
from posttrain.evaluation.pairs import margins
from posttrain.model import assistant
from posttrain.model.assistant import Assistant, dtype_on
from posttrain.model.command_line import trusted_places
from posttrain.serving.batching import Batcher
from posttrain.serving.sampling import Sampling

LONGEST = 512  # tokens of an answer, where --max_tokens is not given


def _load(options: argparse.Namespace, given: list[str]) -> list[Assistant]:
    """Load checkpoints given as [NAME=]DIR, on the GPU where there is one."""
    device = gpus.usual_device()
    assistant.quiet_libraries()
    found = trusted_places(given, options)
    dtype = dtype_on(device, options.dtype)
    return [assistant.load(place, name, options.tokenizer, dtype, device) for name, place in found.items()]


def win_rate(options: argparse.Namespace) -> None:
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
    first, second = (asyncio.run(_answers(one, prompts, options.max_tokens or LONGEST, options.prompts)) for one in models)
    names, asked = [one.name for one in models], list(zip(prompts, first, second, strict=True))
    rows = [{"prompt": prompt, names[0]: a, names[1]: b} for prompt, a, b in asked]
    _write(options.output / "win_rate.jsonl", rows)  # answers take longest, and the judge may fail
    found, refusals = asyncio.run(ask(asked))
    judged = [row | {"verdicts": [one.forward, one.backward], "score": one.score} for row, one in zip(rows, found, strict=True)]
    _write(options.output / "win_rate.jsonl", judged)
    return names, found, refusals


async def _answers(one: Assistant, prompts: list[str], most: int, file: Path) -> list[str]:
    """Return the greedy answers of one checkpoint to the prompts of a file, of `most` tokens at most, many generated at once.

    Raises ValueError for a prompt that leaves no room for an answer.
    """
    batcher = Batcher(one, 32, models=2)
    batcher.start()
    system = [{"role": "system", "content": one.system_prompt}] if one.system_prompt else []
    gate = asyncio.Semaphore(64)

    async def answer(number: int, text: str) -> str:
        ids = render_prompt(one.chat, [*system, {"role": "user", "content": text}])
        if len(ids) >= (most_in_all := one.context_in_batches):
            many = f"{len(ids):,} tokens; {one.name} reads {most_in_all:,}"
            raise ValueError(f"prompt {number} of {file} has {many}, the answer included: {text[:60]!r} ...")
        async with gate:
            made = batcher.generate(ids, Sampling(min(most, most_in_all - len(ids)), 0.0), 3600)
            tokens = [token async for new in made for token in new]
        return one.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    try:
        return await asyncio.gather(*[answer(number, text) for number, text in enumerate(prompts, 1)])
    finally:
        batcher.stop()


def reward_accuracy(options: argparse.Namespace) -> None:
    """Measure how often the policy prefers the chosen answer of a pair more than its reference does."""
    files.refuse_existing(options.output, "reward_accuracy.json")
    prepared = load_prepared(str(options.pairs), "dpo", places.command("prepare-dpo", "--output_dir", options.pairs))
    policy, reference = _load(options, [*options.checkpoint, options.reference])
    for one in (policy, reference):
        if fingerprint(one.tokenizer) != prepared.manifest["tokenizer"]:
            raise ValueError(f"{options.pairs} was prepared with another tokenizer than {one.name}'s; prepare it again with --tokenizer")
    check_rows(prepared, str(options.pairs), len(reference.tokenizer))
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
