"""Post-training of language models: supervised fine-tuning and preference optimization on DeepSpeed."""

__version__ = "0.2.0"
