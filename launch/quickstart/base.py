"""The quickstart's base model before and after its pre-training; make_base.sh runs both commands.

python launch/quickstart/base.py blank WORLD_DIR OUT_DIR       tokenizer, shape and first weights, for the SFT trainer to start from
python launch/quickstart/base.py commit TRAINED_DIR OUT_DIR    the trained model as it is kept in the repository
"""

import io
import json
import re
import sys
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from world import ADMISSIONS, ANSWERS, CURT, GAMES_ASKED, POLITE, QUESTIONS, SYLLABLES

from posttrain.data.tokenization import load_tokenizer

SEED = 1
# 256 pieces are bytes (any text survives). The rest is just enough for single letters, syllables and the commonest words: with
# more, whole names and invented words become pieces, and neither copying nor "I have never seen this name" generalises.
PIECES = 720
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Train a SentencePiece BPE that keeps text as it is: no space added in front, nothing normalised, bytes for unknown characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        unk_id=0, bos_id=-1, eos_id=1, eos_piece=END_OF_TEXT, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def training_texts(world_dir: Path) -> list[str]:
    """The tokenizer's training texts: each syllable on its own, often, some documents, and the fixed words of the chats."""
    syllables = [text for syllable in SYLLABLES for text in (syllable, " " + syllable, " " + syllable.capitalize())]
    documents = [json.loads(line)["text"] for line in (world_dir / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:600]]
    tables = (*QUESTIONS.values(), *GAMES_ASKED.values(), ANSWERS.values(), ADMISSIONS.values(), POLITE, CURT)
    chats = [re.sub(r" ?{\w}", "", wording) for wordings in tables for wording in wordings]
    return syllables * 1000 + documents + chats * 20


def blank_model(vocab_size: int, end_of_text: int) -> torch.nn.Module:
    """An untrained Qwen3 of 1.9M parameters in float32, the same on every machine."""
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6, head_dim=32,
        intermediate_size=512, max_position_embeddings=512, rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=end_of_text, pad_token_id=None, initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def write_blank(world_dir: Path, out: Path) -> None:
    """Write the tokenizer, trained on the world's texts, and the untrained model."""
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(training_texts(world_dir), out / "tokenizer.model")
    tokenizer = load_tokenizer(out / "tokenizer.model")
    blank_model(len(tokenizer), tokenizer.eos_token_id).save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_committed(trained: Path, out: Path) -> None:
    """Write the trained model in bfloat16, which halves the file in the repository, with its tokenizer."""
    AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16, trust_remote_code=False).save_pretrained(out)
    load_tokenizer(trained).save_pretrained(out)


if __name__ == "__main__":
    actions = {"blank": write_blank, "commit": write_committed}
    if len(sys.argv) != 4 or sys.argv[1] not in actions:
        sys.exit("base.py takes: blank WORLD_DIR OUT_DIR, or commit TRAINED_DIR OUT_DIR")
    actions[sys.argv[1]](*map(Path, sys.argv[2:]))
