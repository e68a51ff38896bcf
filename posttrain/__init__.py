"""Post-training of language models: supervised fine-tuning and preference optimization on DeepSpeed."""

from posttrain.cli.notebook import dpo, prepare, sft

__version__ = "0.2.0"
__all__ = ["__version__", "dpo", "prepare", "sft"]
