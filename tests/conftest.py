"""Fixtures: real development data where it exists, and a tiny world that every test machine can make for itself."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real development data: $POSTTRAIN_SHARED_DATA, or ../shared/data beside the repository."""
    path = Path(os.environ.get("POSTTRAIN_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set POSTTRAIN_SHARED_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A random two-layer Qwen3, its SentencePiece tokenizer, and prepared SFT and DPO data; made by the project's own tools."""
    import sentencepiece
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data_prep.prepare import prepare
    from posttrain.chat import ChatFormat
    from posttrain.tokenization import load_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    words = ["".join(draw.choice("ptkmnlr") + draw.choice("aeiou") for _ in range(draw.randint(1, 3))) for _ in range(60)]

    def sentence(least: int, most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))

    chats = [{"instruction": f"repeat {number} {sentence(1, 4)}", "output": sentence(1, 12)} for number in range(60)]
    pairs = [{"prompt": f"say {number} {sentence(1, 9)}", "chosen": sentence(1, 6), "rejected": sentence(5, 12)} for number in range(40)]
    (folder / "text.txt").write_text("\n".join(" ".join(row.values()) for row in chats + pairs))
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "dpo.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(folder / "tokenizer.model")
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


def launch(script: str, *arguments: str, ranks: int = 2, timeout: float = 300, **popen) -> subprocess.CompletedProcess:
    """Run a script under the real deepspeed launcher and return what it printed (both streams in stdout)."""
    command = launch_command(script, *arguments, ranks=ranks)
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, timeout=timeout, **merged, **({"env": rank_environment()} | popen))


def launch_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of launch/ from another directory on two ranks, as a user would."""
    command = ["bash", str(ROOT / "launch" / name), *arguments]
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd="/", timeout=300, env=rank_environment() | {"NUM_GPUS": "2"} | environment, **merged)


def launch_command(script: str, *arguments: str, ranks: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    return [*launcher, "--num_gpus", str(ranks), "--master_port", str(port), str(ROOT / script), *map(str, arguments)]


def rank_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def metrics(run: Path, split: str = "train") -> list[dict]:
    """The records of a run's metrics.jsonl."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]
