"""Reads what a run has to compute: its model's shape and the lengths of its examples, or assumes them where they are not there yet."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from posttrain.common import hub
from posttrain.data.packing import MicroBatch, RowBuilder
from posttrain.data.parts import IGNORE
from posttrain.data.prepared import load_prepared
from posttrain.engine import checkpoint_folder
from posttrain.model import ckpt_pt
from posttrain.model.classes import class_of, freeze_all_but_text
from posttrain.model.forms import is_ckpt_pt
from posttrain.model.loading import read_config
from posttrain.planning.shapes import assumed_shape
from posttrain.recipes.keys import DPORecipe, Recipe

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
        """Build a micro-batch of at most `tokens` tokens: of the longest examples as many as fit, then shorter ones in what is left.

        Where none fits, it is of the shortest one, cut to `tokens`.
        """
        if tokens < (least := self.lengths.min()):
            arrays = (self.prompt, self.answers, self.trained)
            cut = (np.maximum(1, array * tokens // least) if array.any() else array for array in arrays)
            return Work(self.count, *cut, self.shared).batch_of([self.lengths.argmin()])
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
    """Return the config of the recipe's model, its numbers of trained and other parameters, and a sentence for plan.py.

    Of a model that also sees pictures it is the text part's config, if there is a model of it alone.

    Where the model is not there yet, a shape of assumed_shape stands in. Raises ValueError where there is none.
    """
    if shape := assumed_shape(recipe, assumed):
        config = shape.config()
        return config, *count_parameters(config), f"none at {recipe.model_path} yet: assumed {shape.name}'s shape"
    if is_ckpt_pt(recipe.model_path):
        config = ckpt_pt.read_config(recipe.model_path)
    else:
        place = Path(recipe.model_path)
        described = checkpoint_folder.model_description(place) if checkpoint_folder.is_checkpoint(place) else recipe.model_path
        config = read_config(hub.snapshot_in(str(described)))
    text = config.get_text_config()
    return text if class_of(text) else config, *count_parameters(config), recipe.model_path


def count_parameters(config) -> tuple[int, int]:
    """Return how many parameters of a transformers config's model are trained and how many are not, without allocating it."""
    with torch.device("meta"):
        model = class_of(config)._from_config(copy.deepcopy(config))
    frozen = freeze_all_but_text(model)
    return model.num_parameters(), frozen


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
    split = load_prepared(recipe.data_dir, kind, "", getattr(recipe, "share_prompt", True), checksums=False).train
    said = f"{recipe.data_dir}: {len(split):,} examples of {split.lengths.mean():,.0f} tokens, the longest {split.lengths.max():,}"
    if kind == "sft":
        return Work(len(split), np.zeros(len(split), np.int64), split.lengths[:, None], split.trained, False), said
    prompt, *answers = (split.token_counts(name) for name in ("prompt", "chosen", "rejected"))
    return Work(len(split), prompt, np.stack(answers, 1), split.trained, shared), said
