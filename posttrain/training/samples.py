"""Lets the model in training answer a few fixed prompts, before the first step and at every validation: what curves do not show."""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed as dist

from posttrain.common.files import read_prompts
from posttrain.data.chat import ChatFormat, render_prompt
from posttrain.data.packing import RowBuilder
from posttrain.data.parts import IGNORE
from posttrain.data.prepared import PreparedData
from posttrain.parallel import watchdog
from posttrain.parallel.ranks import gathered
from posttrain.recipes.keys import Recipe
from posttrain.training.state import Training


class Asked(NamedTuple):
    """A prompt to be answered, in token ids."""

    prompt: list[int]
    most: int  # longest answer in tokens, at least 1
    is_complete: Callable[[list[int]], bool]  # whether the answer so far is complete with its last token


class Samples:
    """The fixed prompts of a run, which the model answers again and again."""

    def __init__(self, recipe: Recipe, data: PreparedData, chat: ChatFormat, context: int):
        """Take the recipe's prompts, for a model that reads `context` tokens, answers included.

        Raises ValueError or FileNotFoundError if the recipe's file sample_prompts is missing, no text, or has a prompt that is too long.
        """
        self.most, self.chat = recipe.sample_tokens, chat
        if recipe.sample_prompts:
            system = data.system_prompt
            begin = [{"role": "system", "content": system}] if system else []
            self.texts = read_prompts(Path(recipe.sample_prompts), recipe.samples)
            self.prompts = [render_prompt(chat, [*begin, {"role": "user", "content": text}]) for text in self.texts]
        else:
            split = data.validation if len(data.validation) else data.train
            self.prompts = [_prompt_of(split[index]) for index in range(min(recipe.samples, len(split)))]
            self.texts = [chat.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in self.prompts]
        self.context = context
        if longest := next((prompt for prompt in self.prompts if len(prompt) >= context), None):
            raise ValueError(f"a sample prompt has {len(longest):,} tokens; the model reads {context:,}, its answer included")

    def ask(self, training: Training) -> list[dict]:
        """Return each prompt with the model's greedy answer, its tokens, and whether it stopped by itself. All ranks."""
        stops = {self.chat.end_id, self.chat.tokenizer.eos_token_id}
        training.engine.eval()
        room = [min(self.most, self.context - len(prompt)) for prompt in self.prompts]
        asked = [Asked(prompt, most, lambda answer: answer[-1] in stops) for prompt, most in zip(self.prompts, room, strict=True)]
        answers = generate(training, asked)
        training.engine.train()
        found = []
        for text, answer in zip(self.texts, answers, strict=True):
            stopped = answer[-1] in stops
            ids = answer[:-1] if stopped else answer
            found.append({"prompt": text, "answer": self.chat.tokenizer.decode(ids), "tokens": len(ids), "stopped": stopped})
        return found


def _prompt_of(example: dict) -> list[int]:
    """Return what comes before a prepared row's first answer; of a document, which is trained from its beginning, the first half."""
    if "prompt" in example:
        return example["prompt"]
    first = next(index for index, label in enumerate(example["labels"]) if label != IGNORE)
    return example["input_ids"][: first if first > 1 else max(1, len(example["input_ids"]) // 2)]


@torch.no_grad()
def generate(training: Training, asked: list[Asked]) -> list[list[int]]:
    """Return the greedy answer to each prompt, with the token that completes it. All ranks; the engine must be in eval mode.

    Training's forward pass reads a rank's prompts anew for every token, as many in one packed row as have room. For a few prompts that
    costs less than a key-value cache would save, and it works however the weights are sharded.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = asked[rank::ranks]
    answers: list[list[int]] = [[] for _ in mine]
    waiting = list(range(len(mine)))
    while True:
        watchdog.enter("eval")
        going = _count_that_fit([len(mine[index].prompt) + mine[index].most for index in waiting], training.max_tokens)
        left = torch.tensor([going], device=training.device)
        dist.all_reduce(left)
        if not left.item():
            break
        read = waiting[:going]
        chosen = training.engine(_next_tokens([mine[index].prompt + answers[index] for index in read], training.device))
        for index, token in zip(read, chosen.tolist(), strict=False):  # a rank that is done still reads one token, since all must read
            answers[index].append(token)
            if len(answers[index]) == mine[index].most or mine[index].is_complete(answers[index]):
                waiting.remove(index)
    shares = gathered(answers)
    return [shares[number % ranks][number // ranks] for number in range(len(asked))]


def _count_that_fit(lengths: list[int], room: int) -> int:
    """Return how many of the first `lengths` add up to at most `room`, and at least 1."""
    return max(min(1, len(lengths)), bisect_right(list(accumulate(lengths)), room))


def _next_tokens(sequences: list[list[int]], device: torch.device):
    """Build a micro-batch that asks for the token after each sequence."""
    builder = RowBuilder()
    for ids in sequences or [[0]]:
        builder.add_sequence(ids, [IGNORE] * len(ids))
    batch = builder.build()
    last = batch.packing.segments[:, 1] - 1
    return batch._replace(rows=last, targets=None).to(device)
