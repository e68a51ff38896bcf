"""What only a GPU runs: flash attention, liger's and compiled kernels, offload. Skipped where there is none.

Each way of training goes through three steps of the tiny world in this process, beside the plainest one, float32 and torch's own kernels,
which itself is compared with the real command on the CPU.
"""

import gc
from functools import cache

import pytest
import torch
from conftest import launch_with_deepspeed, metrics, rank_environment
from tiny import build_training

from posttrain.operators import attention, layers, logprob
from posttrain.operators.attention_varlen import VARLEN
from posttrain.training.step import train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 3
COMMON = {"max_iters": STEPS, "global_batch_size": 8, "learning_rate": 1e-3, "min_lr": 1e-3, "max_tokens_per_gpu": 256, "warmup_iters": 0}
SAME, ROUNDING = 1e-4, 5e-2  # relative, of losses and norms: float32 on another device, and bfloat16


def on_cpu(tiny: str, kind: str) -> list[tuple[float, float]]:
    names = ("checkpoint_path", "sft_data_dir") if kind == "sft" else ("sft_checkpoint_path", "dpo_data_dir")
    settings = COMMON | {names[0]: f"{tiny}/base", names[1]: f"{tiny}/{kind}", "out_dir": f"{tiny}/cpu_{kind}", "dtype": "float32"}
    settings |= {"kernels": "torch", "eval_interval": 0, "save_interval": 0}
    done = launch_with_deepspeed(
        f"posttrain/{kind}.py",
        *(f"--{name}={value}" for name, value in settings.items()),
        ranks=1,
        env=rank_environment() | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return [(record["loss"], record["grad_norm"]) for record in metrics(f"{tiny}/cpu_{kind}")]


def on_gpu(tiny: str, kind: str, settings: dict) -> list[tuple[float, float]]:
    training = build_training(tiny, kind, COMMON | {"out_dir": f"{tiny}/gpu"} | settings)
    assert training.device.type == "cuda"
    steps = [train_step(training, step)[0] for step in range(1, STEPS + 1)]
    training.engine.free()
    del training
    gc.collect()
    torch.cuda.empty_cache()
    return [(one["loss"], one["grad_norm"]) for one in steps]


@cache
def plainest(tiny: str, kind: str) -> list[tuple[float, float]]:
    return on_gpu(tiny, kind, {"dtype": "float32", "kernels": "torch"})


WAYS = {
    "zero1": {"ds_config": "ds_configs/zero1.json"},
    "torch": {"ds_config": "ds_configs/zero1.json", "kernels": "torch"},
    "compile": {"ds_config": "ds_configs/zero1.json", "compile": True},
    "zero2": {"ds_config": "ds_configs/zero2.json"},
    "zero3": {"ds_config": "ds_configs/zero3.json"},
    "zero3_compile": {"ds_config": "ds_configs/zero3.json", "compile": True},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "offload": {"activation_checkpointing": "offload"},
}
ONLY_DPO = {"prompt_twice": {"share_prompt": False}, "precompute": {"reference": "precompute"}}


@pytest.mark.parametrize(("kind", "way"), [("sft", way) for way in WAYS] + [("dpo", way) for way in WAYS | ONLY_DPO])
def test_a_way_of_training_gives_the_plainest_curve(tiny, kind, way):
    seen, expected = on_gpu(str(tiny.folder), kind, (WAYS | ONLY_DPO)[way]), plainest(str(tiny.folder), kind)
    for here, there in zip(seen, expected, strict=True):
        assert here == pytest.approx(there, rel=ROUNDING), (seen, expected)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_plainest_curve_is_that_of_the_cpu(tiny, kind):
    for here, there in zip(plainest(str(tiny.folder), kind), on_cpu(str(tiny.folder), kind), strict=True):
        assert here == pytest.approx(there, rel=SAME)


def test_the_chosen_kernels_are_those_made_for_gpus(tiny):
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda")
    model = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.bfloat16).to(device)
    assert attention.choose("auto", device, torch.bfloat16, 0.0, model.config)[0] == VARLEN
    assert "liger-kernel" in layers.choose(model, "auto", False, device)[0]
    assert "not" not in layers.choose(model, "auto", False, device)[0]
    head = model.get_output_embeddings()
    head.__class__ = logprob.LogProbHead
    assert ", compiled" in head.choose("auto", device, 0.0) and head.way.adds_products


def test_the_largest_gradients_of_a_large_head_are_right():
    """At a vocabulary and rows that take several pieces."""
    large = {"rows": 1003, "width": 512, "vocabulary": 151_669}
    for way in (logprob.way_on_gpu(24e9, 1e9), logprob.way_on_gpu(100e9, 1e9)):
        assert logprob.disagreement(way, torch.device("cuda"), torch.bfloat16, **large) <= logprob.SAME


def test_the_loss_of_32k_tokens_takes_under_a_gigabyte():
    """With the vocabulary of Qwen3, whose logits would be 20 GB in float32; beside the gradients themselves."""
    rows, hidden, vocabulary = 32_768, 1024, 151_936
    states, weight = (torch.randn(n, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (rows, vocabulary))
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    for way in (logprob.PLAIN, logprob.Way(compiled=True, adds_products=True)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(logprob.token_logps(states, weight, targets, way).sum(), (states, weight))
        gradients = 2 * hidden * (rows + vocabulary)
        assert torch.cuda.max_memory_allocated() - before - gradients < 2**30
