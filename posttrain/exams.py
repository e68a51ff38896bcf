"""Benchmarks of the model in training, at every validation: lm-evaluation-harness's tasks, by log-probs, through the sharded engine."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from torch import distributed as dist

from posttrain import batches, storage, watchdog
from posttrain.chat import TODAY, ChatFormat
from posttrain.config import Recipe
from posttrain.data import RowBuilder
from posttrain.evaluation.tasks import BENCHMARKS, task_name, write_tasks
from posttrain.objectives import answer_sums
from posttrain.ranks import gathered, on_rank_0
from posttrain.step import Training


class Exams:
    """The recipe's benchmarks. What they give is what eval_benchmarks.py --chat on gives on the same items."""

    def __init__(self, recipe: Recipe, chat: ChatFormat, system_prompt: str | None):
        """All ranks. Raises ValueError or FileNotFoundError for a benchmark that is not known, or whose rows are not there."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.names, self.chat, self.system_prompt = recipe.benchmark_names, chat, system_prompt
        self.folder, data = Path(recipe.out_dir) / "benchmarks", recipe.benchmark_data and Path(recipe.benchmark_data)
        on_rank_0(lambda: write_tasks(self.names, "logprob", data, self.folder))
        self.tasks = TaskManager(include_path=str(self.folder), include_defaults=False)
        self.most = recipe.benchmark_samples

    def take(self, training: Training) -> dict[str, float]:
        """benchmark/NAME: the headline metric of each, over the first items; latest_NAME.jsonl has their choices' log-probs. All ranks."""
        training.engine.eval()
        wanted = {task_name(name, "logprob"): name for name in self.names}
        found = evaluate(
            _Packed(training, self.chat),
            self.tasks.load(list(wanted)),
            limit=self.most,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=True,
            system_instruction=self.system_prompt,
        )["samples"]
        training.engine.train()
        if dist.get_rank() == 0:
            for task, name in wanted.items():
                items = [{"number": one["doc_id"], "answer": [logp for logp, _ in one["filtered_resps"]]} for one in found[task]]
                storage.write_whole(self.folder / f"latest_{name}.jsonl", "".join(json.dumps(item) + "\n" for item in items))
        scores = {name: [sample[BENCHMARKS[name].metric["logprob"]] for sample in found[task]] for task, name in wanted.items()}
        return {f"benchmark/{name}": math.fsum(values) / len(values) for name, values in scores.items()}


class _Packed(TemplateLM):
    """The engine as the harness's model: prompts and choices in packed micro-batches, dealt to the ranks."""

    backend = "causal"

    def __init__(self, training: Training, chat: ChatFormat):
        super().__init__()
        self.training, self.tokenizer, self.template = training, chat.tokenizer, TODAY + chat.jinja

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
        """Sums of log-probs; all ranks. Whether a choice is what greedy decoding says is not computed: no benchmark here reads it."""
        training, recipe = self.training, self.training.recipe
        most = min(recipe.max_tokens_per_gpu, training.engine.module.model.config.max_position_embeddings)
        rows = [((before + choice)[-most:], len(choice)) for _, before, choice in requests]
        lengths = np.array([len(ids) for ids, _ in rows])
        found: dict[int, float] = {}
        for part in batches.my_share(np.arange(len(rows)), lengths, recipe, dist.get_rank(), dist.get_world_size()):
            watchdog.enter("eval")
            builder = RowBuilder()
            for number in part:
                ids, count = rows[number]
                builder.add_sequence(ids, [-100] * (len(ids) - count) + ids[len(ids) - count :])
            if not len(part):
                builder.add_sequence([0], [-100])
            batch = builder.build().to(training.device)
            sums = answer_sums(training.engine(batch), batch).sum(1).tolist()
            found |= dict(zip(part.tolist(), sums, strict=False))
        everyones = {number: value for share in gathered(found) for number, value in share.items()}
        return [(everyones[number], False) for number in range(len(rows))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError("benchmarks during training compare choices")

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError("benchmarks during training compare choices")
