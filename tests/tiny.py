"""The tiny world of the tests and of benchmarks/invariance.py: a random two-layer Qwen3, its tokenizer, and prepared data."""

import json
import random
from pathlib import Path
from types import SimpleNamespace


def train_tokenizer(folder: Path, vocab_size: int):
    """Train a SentencePiece BPE on FOLDER/text.txt, into FOLDER/tokenizer.model; returns it as the project loads it."""
    import sentencepiece

    from posttrain.data.tokenization import load_tokenizer

    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer(folder / "tokenizer.model")


def make_tiny(folder: Path) -> SimpleNamespace:
    """Write FOLDER/base (model and tokenizer), FOLDER/sft and FOLDER/dpo; all made by the project's own tools, from a fixed seed."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data_prep.prepare import prepare
    from posttrain.data.chat import ChatFormat

    draw = random.Random(0)
    words = ["".join(draw.choice("ptkmnlr") + draw.choice("aeiou") for _ in range(draw.randint(1, 3))) for _ in range(60)]

    def sentence(least: int, most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))

    chats = [{"instruction": f"repeat {number} {sentence(1, 4)}", "output": sentence(1, 12)} for number in range(60)]
    pairs = [{"prompt": f"say {number} {sentence(1, 9)}", "chosen": sentence(1, 6), "rejected": sentence(5, 12)} for number in range(40)]
    (folder / "text.txt").write_text("\n".join(" ".join(row.values()) for row in chats + pairs))
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "dpo.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    tokenizer = train_tokenizer(folder, vocab_size=420)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    common = ["--tokenizer", str(folder / "base"), "--val_size", "7"]
    prepare("sft", ["--source", f"{folder}/sft.jsonl", "--output_dir", f"{folder}/sft", *common])
    prepare("dpo", ["--source", f"{folder}/dpo.jsonl", "--output_dir", f"{folder}/dpo", *common])
    base, sft, dpo = (str(folder / name) for name in ("base", "sft", "dpo"))
    return SimpleNamespace(folder=folder, base=base, sft=sft, dpo=dpo, tokenizer=tokenizer, chat=ChatFormat(tokenizer), words=words)


def build_training(tiny: str, kind: str, settings: dict):
    """A Training on the tiny world, as the scripts build it, in this process: several may follow each other. All ranks."""
    import torch

    from posttrain.engine.start import start_distributed
    from posttrain.recipes.keys import DPORecipe, SFTRecipe
    from posttrain.recipes.reading import build_recipe
    from posttrain.training import auto_layout, build

    torch._dynamo.reset()  # else the layers of one after another, which share their code, would reach the limit of recompilations
    names = ("checkpoint_path", "sft_data_dir") if kind == "sft" else ("sft_checkpoint_path", "dpo_data_dir")
    paths = {names[0]: f"{tiny}/base", names[1]: f"{tiny}/{kind}"}  # unless the settings name others
    recipe = build_recipe(SFTRecipe if kind == "sft" else DPORecipe, {**paths, **settings}, {})
    inputs = build.read_inputs(recipe)
    device = start_distributed()
    return build.build_training(auto_layout.settle(recipe, inputs.data, device)[0], inputs, device)[0]
