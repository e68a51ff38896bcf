"""Runs benchmarks on one checkpoint with lm-evaluation-harness, each rank its share of the items, and keeps every item."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from posttrain.evaluation.tasks import BENCHMARKS, load_tasks, task_name
from posttrain.model.assistant import Assistant


class Item(NamedTuple):
    """One question of a benchmark: what was asked, what was answered, what it scored."""

    number: int  # its place in the benchmark
    prompt: str
    target: str | int  # the right answer, as the harness has it
    answer: list  # log-probs of the choices, or what was generated and what was read from it
    score: float  # the headline metric
    scores: dict[str, float]  # every metric of the harness
    chance: float | None  # what guessing would score, where there are choices


class Model(HFLM):
    """The harness's model, but without progress bars where TQDM_DISABLE is set: it shows them in any case."""

    def loglikelihood(self, requests, disable_tqdm=False):
        return super().loglikelihood(requests, disable_tqdm or bool(os.environ.get("TQDM_DISABLE")))

    def generate_until(self, requests, disable_tqdm=False):
        return super().generate_until(requests, disable_tqdm or bool(os.environ.get("TQDM_DISABLE")))


def measure(
    assistant: Assistant,
    names: list[str],
    *,
    mode: str,
    tasks: Path,
    max_samples: int | None,
    batch_size: int,
    chat: bool,
    rank: int,
    ranks: int,
) -> dict[str, list[Item]]:
    """Return the items of each benchmark that this rank of `ranks` measures: every `ranks`-th of the first `max_samples` (None: of all).

    `tasks` is a folder that write_tasks has filled; `chat` asks in the tokenizer's chat template.
    """
    for noisy in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.evaluator"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    loaded = load_tasks(str(tasks), [task_name(name, mode) for name in names], assistant.context)
    shares = {}
    for name, task in loaded["tasks"].items():
        if task.get_config("num_fewshot"):
            _deal(task.sampler, rank, ranks)
        if share := list(range(len(task.eval_docs))[:max_samples])[rank::ranks]:
            shares[name] = share
    found = {}
    if shares:
        loaded["tasks"] = {name: task for name, task in loaded["tasks"].items() if name in shares}
        found = evaluate(
            _as_harness_model(assistant, batch_size),
            loaded,
            samples=shares,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=assistant.system_prompt if chat else None,
        )["samples"]
    return {name: items_of(found.get(task_name(name, mode), []), name, mode) for name in names}


def _as_harness_model(assistant: Assistant, batch_size: int) -> Model:
    """Return the harness's model over the checkpoint, whose generation config is changed for it."""
    # HFLM asks the model itself where to stop; a base model's own end is not its template's. And it gives the task's limit as max_length,
    # which a folder's own max_new_tokens would silently overrule (lm_eval 0.4.13 with transformers 5.23).
    settings = assistant.model.generation_config
    settings.eos_token_id, settings.max_new_tokens = sorted(assistant.stops), None
    about = {"batch_size": batch_size, "max_length": assistant.context, "backend": "causal"}
    return Model(pretrained=assistant.model, tokenizer=assistant.tokenizer, **about)


def items_of(samples: list[dict], benchmark: str, mode: str) -> list[Item]:
    """Return the items of a benchmark from what the harness's evaluate() logged.

    It logs every item once for each of the benchmark's filters; the last filter counts, which is the most forgiving.
    """
    return [_item(sample, BENCHMARKS[benchmark].metric[mode], mode) for sample in samples if sample["filter"] == samples[-1]["filter"]]


def _deal(sampler, rank: int, ranks: int) -> None:
    """Make the sampler draw each item's few-shot examples as one rank alone would: skip the draws for the items of other ranks."""
    draw, skipped = sampler.sample, rank

    def sample(*arguments, **options):
        nonlocal skipped
        for _ in range(skipped):
            draw(*arguments, **options)
        skipped = ranks - 1
        return draw(*arguments, **options)

    sampler.sample = sample


def _chance(sample: dict, choices: int | None) -> float | None:
    """Return the mean score of guessing on an item; None where there are no choices."""
    if "mc2_targets" in sample["doc"]:  # the score is the probability of the true answers
        labels = sample["doc"]["mc2_targets"]["labels"]
        return sum(labels) / len(labels)
    return 1 / choices if choices else None


def _item(sample: dict, metric: str, mode: str) -> Item:
    """Return the item of one logged sample, whose headline metric is `metric`."""
    arguments = list(sample["arguments"].values()) if isinstance(sample["arguments"], dict) else sample["arguments"]
    first = arguments[0]
    prompt = first["arg_0"] if isinstance(first, dict) else first[0]
    responses = [list(one) if isinstance(one, (tuple, list)) else one for one in sample["filtered_resps"]]
    choices = len(arguments) if mode == "logprob" else len(sample["doc"]["choices"]) if "choices" in sample["doc"] else None
    answer = responses if mode == "logprob" else [sample["resps"][0][0], *responses]
    scores = {name: sample[name] for name in sample["metrics"]}
    return Item(sample["doc_id"], prompt, sample["target"], answer, float(scores[metric]), scores, _chance(sample, choices))
