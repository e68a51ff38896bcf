"""Runs benchmarks on the model in training: lm-evaluation-harness's tasks, computed by the engine as it is sharded."""

import json
import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch import distributed as dist

from posttrain.common import files
from posttrain.data.chat import ChatFormat
from posttrain.data.packing import RowBuilder
from posttrain.data.parts import IGNORE
from posttrain.evaluation.measure import items_of
from posttrain.evaluation.tasks import BENCHMARKS, load_tasks, task_name, write_tasks
from posttrain.objectives.answers import answer_sums
from posttrain.parallel import watchdog
from posttrain.parallel.ranks import gathered, on_rank_0
from posttrain.recipes.keys import Recipe
from posttrain.training.samples import Asked, generate
from posttrain.training.state import Training


class TrainingBenchmarks:
    """The recipe's benchmarks: those with choices are scored by log-probs, the others by generation.

    Scores are those that eval_benchmarks.py --chat on gives on the same items.
    """

    def __init__(self, recipe: Recipe, chat: ChatFormat, system_prompt: str | None, context: int):
        """Write the benchmarks' task files and load them once, to find mistakes before training. All ranks.

        `context` is the model's context length in tokens. Raises ValueError or FileNotFoundError for a benchmark that is unknown, does not
        fit into it, or has no data.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if unknown := [name for name in recipe.benchmark_names if name not in BENCHMARKS]:
            raise ValueError(f"benchmarks: there is no {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
        self.modes = {name: next(iter(BENCHMARKS[name].metric)) for name in recipe.benchmark_names}
        self.chat, self.system_prompt, self.most, self.context = chat, system_prompt, recipe.benchmark_samples, context
        self.folder, data = Path(recipe.out_dir) / "benchmarks", recipe.benchmark_data and Path(recipe.benchmark_data)
        for mode in set(self.modes.values()):
            on_rank_0(lambda mode=mode: write_tasks([name for name, its in self.modes.items() if its == mode], mode, data, self.folder))
        self._tasks()

    def _tasks(self) -> dict:
        """Load the harness's tasks by name."""
        return load_tasks(str(self.folder), [task_name(name, mode) for name, mode in self.modes.items()], self.context)

    def take(self, training: Training) -> dict[str, float]:
        """Run all benchmarks on their first items; return each one's headline metric as benchmark/NAME. All ranks.

        benchmarks/latest_NAME.jsonl in the run directory gets prompts, answers and scores.
        """
        training.engine.eval()
        found = evaluate(
            _EngineModel(training, self.chat),
            self._tasks(),  # loaded anew, so that few-shot examples are the same every time
            limit=self.most,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            system_instruction=self.system_prompt,
        )["samples"]
        training.engine.train()
        items = {name: items_of(found[task_name(name, mode)], name, mode) for name, mode in self.modes.items()}
        if dist.get_rank() == 0:
            for name, measured in items.items():
                lines = [json.dumps(item._asdict(), ensure_ascii=False) for item in measured]
                files.write_whole(self.folder / f"latest_{name}.jsonl", "\n".join(lines) + "\n")
        return {f"benchmark/{name}": math.fsum(item.score for item in measured) / len(measured) for name, measured in items.items()}


class _EngineModel(TemplateLM):
    """The engine as one of the harness's models: prompts and choices are packed into micro-batches and dealt to the ranks."""

    backend = "causal"

    def __init__(self, training: Training, chat: ChatFormat):
        super().__init__()
        self.training, self.chat, self.tokenizer, self.template = training, chat, chat.tokenizer, chat.asking_jinja

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return "posttrain"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        bos = self.tokenizer.bos_token
        return self.tokenizer.encode(string, add_special_tokens=not (bos and string.startswith(bos)))

    def chat_template(self, chat_template=False) -> str:
        return self.template

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, chat_template=self.template, **how)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Return each choice's summed log-probs. All ranks. Whether greedy decoding gives it is not computed: no benchmark reads that."""
        training = self.training
        most = min(training.max_tokens, training.context)
        rows = [((before + choice)[-most:], len(choice)) for _, before, choice in requests]
        lengths = np.array([len(ids) for ids, _ in rows])
        found: dict[int, float] = {}
        for part in training.micro_batches(np.arange(len(rows)), lengths):
            watchdog.enter("eval")
            builder = RowBuilder()
            for number in part:
                ids, count = rows[number]
                builder.add_sequence(ids, [IGNORE] * (len(ids) - count) + ids[len(ids) - count :])
            if not len(part):
                builder.add_sequence([0], [IGNORE])
            batch = builder.build().to(training.device)
            sums = answer_sums(training.engine(batch), batch).sum(1).tolist()
            found |= dict(zip(part.tolist(), sums, strict=False))
        everyones = {number: value for share in gathered(found) for number, value in share.items()}
        return [(everyones[number], False) for number in range(len(rows))]

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """Return the greedy answer to each request, cut where its task says. All ranks."""
        stops = {self.tokenizer.eos_token_id, self.chat.end_id}
        context = self.training.context
        asked, ends = [], []
        for request in requests:
            text, how = request.args
            how = normalize_gen_kwargs(how)
            most, until = how["max_gen_toks"], how["until"]
            asked.append(Asked(self.tok_encode(text)[most - context :], most, partial(self._is_complete, stops, until)))
            ends.append(until)
        answers = map(self._text, generate(self.training, asked))
        return [postprocess_generated_text(answer, until, None) for answer, until in zip(answers, ends, strict=True)]

    def _is_complete(self, stops: set[int], until: list[str], answer: list[int]) -> bool:
        """Whether an answer has ended: with a stop token, or with one of the texts `until`."""
        return answer[-1] in stops or any(end in self._text(answer) for end in until)

    def _text(self, answer: list[int]) -> str:
        return self.tokenizer.decode(answer, skip_special_tokens=True)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError("no benchmark here needs the log-probs of whole documents")
