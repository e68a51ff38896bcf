"""Reads what a run has to compute: its model's shape and the lengths of its examples, or assumes them where they are not there yet."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from posttrain.data.packing import MicroBatch, RowBuilder
from posttrain.data.parts import IGNORE
from posttrain.data.prepared import load_prepared
from posttrain.engine import checkpoint_folder
from posttrain.model import ckpt_pt
from posttrain.model.loading import find_model
from posttrain.recipes.keys import DPORecipe, Recipe

LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768}


def _shape(kind, hidden: int, feed_forward: int, depth: int, heads: int, **others):
    """Return a transformers config of class `kind` with these sizes."""
    sizes = {"hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": depth, "num_attention_heads": heads}
    return kind(**sizes, **others)


# by their size, as it stands in models' names: the shape to assume
SHAPES = {
    "0.6b": ("Qwen3-0.6B", _shape(Qwen3Config, 1024, 3072, 28, 16, **QWEN3, tie_word_embeddings=True)),
    "1b": ("Llama-3.2-1B", _shape(LlamaConfig, 2048, 8192, 16, 32, **LLAMA3, tie_word_embeddings=True)),
    "1.8b": ("Qwen3-1.7B", _shape(Qwen3Config, 2048, 6144, 28, 16, **QWEN3, tie_word_embeddings=True)),
    "3b": ("Llama-3.2-3B", _shape(LlamaConfig, 3072, 8192, 28, 24, **LLAMA3, tie_word_embeddings=True)),
    "4b": ("Qwen3-4B", _shape(Qwen3Config, 2560, 9728, 36, 32, **QWEN3, tie_word_embeddings=True)),
    "7b": ("Mistral-7B", _shape(LlamaConfig, 4096, 14336, 32, 32, vocab_size=32768, num_key_value_heads=8)),
    "8b": ("Qwen3-8B", _shape(Qwen3Config, 4096, 12288, 36, 32, **QWEN3, tie_word_embeddings=False)),
    "14b": ("Qwen3-14B", _shape(Qwen3Config, 5120, 17408, 40, 40, **QWEN3, tie_word_embeddings=False)),
    "32b": ("Qwen3-32B", _shape(Qwen3Config, 5120, 25600, 64, 64, **QWEN3, tie_word_embeddings=False)),
    "70b": ("Llama-3.1-70B", _shape(LlamaConfig, 8192, 28672, 80, 64, **LLAMA3)),
}
ASSUMED_ROW, ASSUMED_ROWS = 2048, 50_000  # tokens of an example, and examples


@dataclass(frozen=True)
class Work:
    """The lengths of a run's `count` examples, in tokens. Arrays have an entry an example, or a single one where all are alike."""

    count: int
    prompt: np.ndarray  # (examples,) DPO's prompts; 0 for SFT, whose `answers` are whole rows
    answers: np.ndarray  # (examples, 1 or 2) SFT's row; DPO's chosen and rejected answer
    trained: np.ndarray  # (examples,) trained tokens
    shared: bool  # whether the prompt is computed once for both answers

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each example takes in a micro-batch."""
        copies = 1 if self.shared else self.answers.shape[1]
        return self.prompt * copies + self.answers.sum(1)

    def attended(self) -> np.ndarray:
        """Return how many query-key pairs causal attention computes in each example."""
        whole = (self.prompt[:, None] + self.answers) ** 2 / 2
        again = (self.answers.shape[1] - 1) * self.prompt**2 / 2 if self.shared else 0
        return whole.sum(1) - again

    def micro_batch(self, tokens: int) -> MicroBatch:
        """Build a micro-batch of at most `tokens` tokens: of the longest examples as many as fit, then shorter ones in what is left."""
        chosen, left = [], tokens
        order = np.argsort(self.lengths, kind="stable")
        ascending = self.lengths[order]
        while (fits := int(np.searchsorted(ascending, left, side="right"))) and (left == tokens or left > tokens / 64):
            chosen.append(int(order[fits - 1]))
            left -= int(ascending[fits - 1])
        return self.batch_of(chosen)

    def batch_of(self, examples) -> MicroBatch:
        """Build the micro-batch of the examples with these indices; all its token ids are 0."""
        builder = RowBuilder()
        for index in examples:
            self._add(builder, int(index))
        return builder.build()

    def _add(self, builder: RowBuilder, index: int) -> None:
        prompt, answers, trained = int(self.prompt[index]), self.answers[index].tolist(), int(self.trained[index])
        if len(answers) == 2:
            builder.add_pair([0] * prompt, [0] * answers[0], [0] * answers[1], self.shared)
        else:
            builder.add_sequence([0] * answers[0], [IGNORE] * (answers[0] - trained) + [0] * trained)


def read_model_shape(recipe: Recipe, assumed: str | None):
    """Return the config of the recipe's model, its number of parameters, and a sentence about it for plan.py.

    Where the model is not there yet, the one of SHAPES that `assumed` names stands in, or else the one of the size in the model's name.
    Raises ValueError for `assumed` where the model is there, and for a name without a size that is known.
    """
    try:
        find_model(recipe.model_path, "")
    except FileNotFoundError:
        name, config = SHAPES[assumed or _size_in_name(recipe.model_path)]
        return config, count_parameters(config), f"none at {recipe.model_path} yet: assumed {name}'s shape"
    if assumed:
        raise ValueError(f"--model={assumed} would not be read: the recipe's model, {recipe.model_path}, is there. Remove it")
    if ckpt_pt.is_ckpt_pt(recipe.model_path):
        config = ckpt_pt.load_ckpt_pt(recipe.model_path, None).config
    else:
        place = Path(recipe.model_path)
        config = AutoConfig.from_pretrained(
            checkpoint_folder.model_description(place) if checkpoint_folder.is_checkpoint(place) else recipe.model_path
        )
    return config, count_parameters(config), recipe.model_path


def _size_in_name(path: str) -> str:
    """Return the key of SHAPES whose size is within a tenth of the last one in a model's name, e.g. of 8B in Qwen/Qwen3-8B-Base.

    Raises ValueError where there is none.
    """
    if re.search(r"\d+b-?a\d+(\.\d+)?b", path.lower()):
        raise ValueError(f"{path} names a mixture of experts, whose memory and time are not estimated here")
    sizes = [float(size) for size in re.findall(r"(?<![\d.a-z])(\d+(?:\.\d+)?)b(?![a-z])", path.lower())]
    for key in SHAPES:
        if sizes and abs(sizes[-1] / float(key.removesuffix("b")) - 1) < 0.1:
            return key
    seen = f"of {sizes[-1]:g}B" if sizes else "whose name does not say its size"
    raise ValueError(
        f"there is no model at {path} yet, one {seen}: download it first, or say which shape to assume with --model={'|'.join(SHAPES)}"
    )


def count_parameters(config) -> int:
    """Return the number of parameters of a transformers config's model, without allocating it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def read_work(recipe: Recipe) -> tuple[Work, str]:
    """Return the lengths of the recipe's training examples, and a sentence about them for plan.py; assumed where there are no data yet."""
    kind, shared = ("dpo", recipe.share_prompt) if isinstance(recipe, DPORecipe) else ("sft", False)
    if not Path(recipe.data_dir).is_dir():
        one = np.ones(1, np.int64)
        said = f"none at {recipe.data_dir} yet: assumed rows of {ASSUMED_ROW:,} tokens"
        if kind == "sft":
            return Work(ASSUMED_ROWS, 0 * one, ASSUMED_ROW * one[:, None], ASSUMED_ROW * one, False), said
        half = ASSUMED_ROW // 2
        pairs = Work(ASSUMED_ROWS, half * one, half * np.ones((1, 2), np.int64), half * one, shared)
        return pairs, f"{said} ({half:,} of prompt, {half:,} an answer)"
    split = load_prepared(recipe.data_dir, kind, "", getattr(recipe, "share_prompt", True)).train
    said = f"{recipe.data_dir}: {len(split):,} examples of {split.lengths.mean():,.0f} tokens, the longest {split.lengths.max():,}"
    if kind == "sft":
        return Work(len(split), np.zeros(len(split), np.int64), split.lengths[:, None], split.trained, False), said
    prompt, *answers = (split.token_counts(name) for name in ("prompt", "chosen", "rejected"))
    return Work(len(split), prompt, np.stack(answers, 1), split.trained, shared), said
