"""Shapes of well-known models, by their size, which plan.py assumes where the recipe's model is not there yet."""

import re
from pathlib import Path
from typing import NamedTuple

from posttrain.common.errors import nearest_path
from posttrain.model.forms import find_model
from posttrain.recipes.keys import Recipe

LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768}


class Shape(NamedTuple):
    """The sizes of a model; `others` are further keys of its transformers config, of class `kind`."""

    name: str
    kind: str
    hidden: int
    feed_forward: int
    depth: int
    heads: int
    others: dict

    def config(self):
        """Return the transformers config."""
        import transformers

        sizes = {"hidden_size": self.hidden, "intermediate_size": self.feed_forward, "num_hidden_layers": self.depth}
        return getattr(transformers, self.kind)(**sizes, num_attention_heads=self.heads, **self.others)


# by their size, as it stands in models' names
SHAPES = {
    "0.6b": Shape("Qwen3-0.6B", "Qwen3Config", 1024, 3072, 28, 16, dict(**QWEN3, tie_word_embeddings=True)),
    "1b": Shape("Llama-3.2-1B", "LlamaConfig", 2048, 8192, 16, 32, dict(**LLAMA3, tie_word_embeddings=True)),
    "1.8b": Shape("Qwen3-1.7B", "Qwen3Config", 2048, 6144, 28, 16, dict(**QWEN3, tie_word_embeddings=True)),
    "3b": Shape("Llama-3.2-3B", "LlamaConfig", 3072, 8192, 28, 24, dict(**LLAMA3, tie_word_embeddings=True)),
    "4b": Shape("Qwen3-4B", "Qwen3Config", 2560, 9728, 36, 32, dict(**QWEN3, tie_word_embeddings=True)),
    "7b": Shape("Mistral-7B", "LlamaConfig", 4096, 14336, 32, 32, {"vocab_size": 32768, "num_key_value_heads": 8}),
    "8b": Shape("Qwen3-8B", "Qwen3Config", 4096, 12288, 36, 32, dict(**QWEN3, tie_word_embeddings=False)),
    "14b": Shape("Qwen3-14B", "Qwen3Config", 5120, 17408, 40, 40, dict(**QWEN3, tie_word_embeddings=False)),
    "32b": Shape("Qwen3-32B", "Qwen3Config", 5120, 25600, 64, 64, dict(**QWEN3, tie_word_embeddings=False)),
    "70b": Shape("Llama-3.1-70B", "LlamaConfig", 8192, 28672, 80, 64, dict(**LLAMA3)),
}


def assumed_shape(recipe: Recipe, assumed: str | None) -> Shape | None:
    """Return the shape that stands in for the recipe's model, the one that `assumed` names or that of the size in the model's name.

    Returns None where the model is there. Raises ValueError for `assumed` then, and for a name without a size that is known;
    FileNotFoundError where something else lies at the model's path.
    """
    try:
        find_model(recipe.model_path, recipe.how_to_make_model, weights=False)  # a shape is all that is needed
    except FileNotFoundError:
        if Path(recipe.model_path).exists():
            raise
        return SHAPES[assumed or _size_in_name(recipe.model_path)]
    if assumed:
        raise ValueError(f"--model={assumed} would not be read: the recipe's model, {recipe.model_path}, is there. Remove it")
    return None


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
    seen = f"{sizes[-1]:g}B is no size whose shape is known" if sizes else "its name does not say its size"
    raise ValueError(
        f"there is no model at {path}, and {seen}.{nearest_path(path)} Download it first, or say which shape to assume with "
        f"--model={'|'.join(SHAPES)}"
    )
