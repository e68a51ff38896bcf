"""Runs benchmarks on one checkpoint with lm-evaluation-harness, each rank its share, and keeps every item."""

import logging
import os
from typing import NamedTuple

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from posttrain.assistant import Assistant
from posttrain.evaluation.tasks import BENCHMARKS, task_name


class Item(NamedTuple):
    """One question: what was asked, what came back, what it scored."""

    number: int
    prompt: str
    target: str | int
    answer: list  # log-probs of the choices, or what was generated and what was read from it
    score: float  # the headline metric
    scores: dict[str, float]  # every metric of the harness
    chance: float | None  # what guessing would score, where there are choices


class Model(HFLM):
    """The harness's, with bars only for those who watch: it turns them on by itself otherwise."""

    def loglikelihood(self, requests, disable_tqdm=False):
        return super().loglikelihood(requests, disable_tqdm or bool(os.environ.get("TQDM_DISABLE")))

    def generate_until(self, requests, disable_tqdm=False):
        return super().generate_until(requests, disable_tqdm or bool(os.environ.get("TQDM_DISABLE")))


def measure(
    assistant: Assistant, names: list[str], mode: str, tasks: str, most: int | None, batch: int, chat: bool, rank: int, ranks: int
) -> dict[str, list[Item]]:
    """This rank's share of each benchmark's items (`most`: of its first ones)."""
    for noisy in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.evaluator"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # HFLM asks the model itself where to stop; a base model's own end is not its template's
    assistant.model.generation_config.eos_token_id = sorted(assistant.stops)
    lm = Model(pretrained=assistant.model, tokenizer=assistant.tokenizer, batch_size=batch, max_length=assistant.context, backend="causal")
    loaded = TaskManager(include_path=tasks, include_defaults=False).load([task_name(name, mode) for name in names])
    shares = {}
    for name in names:
        task = loaded["tasks"][task_name(name, mode)]
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(1234)  # lm_eval's own
        if task.get_config("num_fewshot"):
            _deal(task.sampler, rank, ranks)
        longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", 0)
        if longest >= assistant.context:
            raise ValueError(
                f"{name} lets a model say {longest:,} tokens; {assistant.name} reads {assistant.context:,} in all: leave it out"
            )
        count = len(task.eval_docs)
        shares[task_name(name, mode)] = list(range(count if most is None else min(most, count)))[rank::ranks]
    system = assistant.system_prompt if chat else None
    found = {}
    asked = {name: share for name, share in shares.items() if share}
    if asked:
        loaded["tasks"] = {name: task for name, task in loaded["tasks"].items() if name in asked}
        found = evaluate(
            lm, loaded, samples=asked, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat, system_instruction=system
        )["samples"]
    result = {}
    for name in names:
        task = task_name(name, mode)
        # a task with several filters gives every item once for each; the last is the most forgiving one
        last = [sample for sample in found.get(task, []) if sample["filter"] == found[task][-1]["filter"]]
        result[name] = [_item(sample, BENCHMARKS[name].metric[mode], mode) for sample in last]
    return result


def _deal(sampler, rank: int, ranks: int) -> None:
    """Let every item keep the examples that it has on one rank: they are drawn item by item, and other ranks' items draw elsewhere."""
    draw, skipped = sampler.sample, rank

    def sample(*arguments, **options):
        nonlocal skipped
        for _ in range(skipped):
            draw(*arguments, **options)
        skipped = ranks - 1
        return draw(*arguments, **options)

    sampler.sample = sample


def _chance(sample: dict, choices: int | None) -> float | None:
    if "mc2_targets" in sample["doc"]:  # the score is the probability of the true answers
        labels = sample["doc"]["mc2_targets"]["labels"]
        return sum(labels) / len(labels)
    return 1 / choices if choices else None


def _item(sample: dict, metric: str, mode: str) -> Item:
    arguments = list(sample["arguments"].values()) if isinstance(sample["arguments"], dict) else sample["arguments"]
    first = arguments[0]
    prompt = first["arg_0"] if isinstance(first, dict) else first[0]
    responses = [list(one) if isinstance(one, (tuple, list)) else one for one in sample["filtered_resps"]]
    choices = len(arguments) if mode == "logprob" else len(sample["doc"]["choices"]) if "choices" in sample["doc"] else None
    answer = responses if mode == "logprob" else [sample["resps"][0][0], *responses]
    scores = {name: sample[name] for name in sample["metrics"]}
    return Item(sample["doc_id"], prompt, sample["target"], answer, float(scores[metric]), scores, _chance(sample, choices))
