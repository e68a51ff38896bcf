"""Runs of other architectures than Llama's, through the real commands: two ranks, ZeRO-3, resumed, and opened by plain transformers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from bases import first_step
from conftest import last_of_each, launch, metrics
from test_architectures import EXPERTS, GATED, SMALL

from posttrain.data.prepared import load_prepared
from posttrain.model.classes import class_in, class_of

LONG = {"max_position_embeddings": 256}
KINDS = {
    "windows and sinks": lambda small: transformers.GptOssConfig(
        **small, head_dim=8, **LONG, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "windows, bounds": lambda small: transformers.Gemma2Config(**small, head_dim=8, **LONG, sliding_window=8, query_pre_attn_scalar=8),
    "a scaled head": lambda small: transformers.CohereConfig(**small, **LONG, logit_scale=0.5),
    "gated delta rule": lambda small: transformers.Qwen3NextConfig(
        **small, head_dim=8, **LONG, **GATED, **EXPERTS, layer_types=["linear_attention", "full_attention"]
    ),
    "Mamba": lambda small: transformers.FalconH1Config(
        **small, head_dim=8, **LONG, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=8, mamba_n_groups=1
    ),
    "pictures, too": lambda small: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**small, head_dim=8, **LONG, sliding_window=64).to_dict(),
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    ),
    "an attention of its own": lambda small: transformers.BloomConfig(
        vocab_size=small["vocab_size"], hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    ),
}
SAID = {
    "windows and sinks": "window     windows of 8 tokens in 1 of 2 layers: the longest example has ",
    "pictures, too": "window     windows of 64 tokens in 2 of 2 layers: no example is longer, so they see all, as full attention does",
}
NUMBERS = [
    "--max_iters=5",
    "--global_batch_size=16",
    "--warmup_iters=0",
    "--learning_rate=1e-3",
    "--dtype=float32",
    "--max_tokens_per_gpu=300",
]
NUMBERS += ["--eval_interval=0", "--grad_clip=0", "--log_interval=1"]


@pytest.fixture(scope="module")
def bases(tiny, tmp_path_factory) -> dict[str, str]:
    """A small random model of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    for number, make in enumerate(KINDS.values()):
        torch.manual_seed(0)
        config = make(SMALL | {"vocab_size": len(tiny.tokenizer)})
        class_of(config)(config).save_pretrained(folder / str(number))
        (folder / str(number) / "preprocessor_config.json").write_text('{"image_size": 28}')
        tiny.tokenizer.save_pretrained(folder / str(number))
    return {kind: str(folder / str(number)) for number, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_on_two_ranks_at_zero_3(kind, tiny, bases, tmp_path):
    """The first step's numbers are transformers' own, and final/ holds what was trained."""
    split = load_prepared(tiny.sft, "sft", "").train
    everything = ["--ds_config=ds_configs/zero3.json", f"--global_batch_size={len(split)}"]
    arguments = [f"--checkpoint_path={bases[kind]}", f"--sft_data_dir={tiny.sft}", f"--out_dir={tmp_path}/run", *NUMBERS, *everything]
    done = launch("posttrain/sft.py", *arguments)
    assert done.returncode == 0, done.stdout
    assert ("a row at a time" in done.stdout) == (kind == "an attention of its own")
    if kind in SAID:
        assert SAID[kind] in done.stdout
    rows = metrics(tmp_path / "run")
    loss, norm = first_step(bases[kind], split)
    assert rows[0]["loss"] == pytest.approx(loss, abs=2e-4)
    assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01
    kind_of_model = class_in(bases[kind])
    trained, report = kind_of_model.from_pretrained(tmp_path / "run" / "final", output_loading_info=True)
    assert not any(report.values())
    base, pictures = dict(kind_of_model.from_pretrained(bases[kind]).named_parameters()), []
    for name, new in trained.named_parameters():
        if "vision" in name or "multi_modal" in name:
            pictures.append(name)
            assert torch.equal(new, base[name])
        elif new.requires_grad:
            assert (new != base[name]).any(), name
    assert bool(pictures) == (kind == "pictures, too") == ("which do not read text or are constants" in done.stdout)
    assert (tmp_path / "run" / "final" / "preprocessor_config.json").read_text() == '{"image_size": 28}'


def train_pairs(base: str, tiny, out_dir: Path, *more: str):
    paths = [f"--sft_checkpoint_path={base}", f"--dpo_data_dir={tiny.dpo}", f"--out_dir={out_dir}"]
    numbers = [*NUMBERS, "--max_iters=4", "--save_interval=2", "--beta=0.3"]
    return launch("posttrain/dpo.py", *last_of_each([*paths, *numbers, *more]))


@pytest.mark.parametrize("kind", ["windows and sinks", "gated delta rule", "pictures, too"])
def test_pairs_with_shared_prompts_give_the_curve_of_pairs_with_two_and_go_on_bit_for_bit(kind, tiny, bases, tmp_path):
    curves = []
    for shares in (True, False):
        done = train_pairs(bases[kind], tiny, tmp_path / f"shares_{shares}", f"--share_prompt={shares}")
        assert done.returncode == 0, done.stdout
        curves.append([[row["loss"], row["grad_norm"]] for row in metrics(tmp_path / f"shares_{shares}")])
    assert curves[0][0][0] == pytest.approx(0.693147, abs=1e-5)
    np.testing.assert_allclose(*curves, rtol=1e-3)
    whole, half = tmp_path / "shares_True", tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "final")
    shutil.rmtree(half / "checkpoints" / "step_000004")
    done = train_pairs(bases[kind], tiny, half)
    assert "continuing after step 2" in done.stdout
    assert [row["loss"] for row in metrics(half)] == [row["loss"] for row in metrics(whole)]
    assert (half / "final" / "model.safetensors").read_bytes() == (whole / "final" / "model.safetensors").read_bytes()
