"""Small updates are not lost: float32 master weights under bfloat16 ones, and a run that is told when its steps do nothing."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import launch, metrics
from safetensors.torch import load_file
from test_planted import dpo_arguments

from posttrain.data.packing import RowBuilder
from posttrain.objectives.answers import answer_sums
from posttrain.training.start_checks import SAME_PRECOMPUTED

ROOT = Path(__file__).parents[1]
STEPS = 20


def bf16_arguments(tiny, out_dir, learning_rate: float) -> list[str]:
    settings = [f"--max_iters={STEPS}", f"--learning_rate={learning_rate}", "--decay_lr=False", "--weight_decay=0"]
    return dpo_arguments(tiny, out_dir, *settings, "--dtype=bfloat16", "--ds_config=ds_configs/zero1.json")


def share_moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    moved = sum((after[name] != before[name]).sum().item() for name in after)
    return moved / sum(tensor.numel() for tensor in after.values())


def in_pure_bfloat16(tiny) -> dict[str, torch.Tensor]:
    """The weights after as many steps at 5e-7 of AdamW on bfloat16 weights themselves, with gradients of a typical size."""
    weights = {name: tensor.bfloat16() for name, tensor in load_file(f"{tiny.base}/model.safetensors").items()}
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-7, betas=(0.9, 0.95), weight_decay=0.0)
    torch.manual_seed(0)
    signs = [torch.randn(parameter.shape).bfloat16() for parameter in parameters]
    for _ in range(STEPS):
        for parameter, sign in zip(parameters, signs, strict=True):
            parameter.grad = sign
        optimizer.step()
    return dict(zip(weights, (parameter.detach() for parameter in parameters), strict=True))


@pytest.mark.slow
def test_dpo_sized_updates_add_up_in_the_master_weights(tiny, tmp_path):
    done = launch("posttrain/dpo.py", *bf16_arguments(tiny, tmp_path / "run", 5e-7))
    assert done.returncode == 0, done.stdout
    assert "too small to register" not in done.stdout
    shares = [record["bf16_changed"] for record in metrics(tmp_path / "run")]
    assert all(1e-4 < share < 0.05 for share in shares)
    base = {name: tensor.bfloat16() for name, tensor in load_file(f"{tiny.base}/model.safetensors").items()}
    ours, pure = share_moved(base, load_file(tmp_path / "run" / "final" / "model.safetensors")), share_moved(base, in_pure_bfloat16(tiny))
    assert ours > 4 * pure  # 20 times 5e-7 is a tenth of a rounding step: it moves a tenth of the weights, or hardly any
    assert ours > 0.04


@pytest.mark.slow
def test_a_step_that_does_nothing_is_told(tiny, tmp_path):
    done = launch("posttrain/dpo.py", *bf16_arguments(tiny, tmp_path / "run", 1e-10))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("at learning rate 1.0e-10 an update is too small to register") == 1
    assert max(record["bf16_changed"] for record in metrics(tmp_path / "run")) < 1e-4


def test_the_band_for_precomputed_log_probs_is_the_measured_one():
    """Above what was measured, with room for other models and GPUs, and not by much: benchmarks/reference_band.py."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "reference_band.json").read_text())
    for dtype, limit in SAME_PRECOMPUTED.items():
        name = str(dtype).removeprefix("torch.")
        largest = max(model[name]["packed_differently"] for model in measured["nats_by_root_of_tokens"].values())
        assert 3 * largest < limit < 10 * largest
        assert measured["limits"][name] == limit


def test_answers_are_summed_in_float64(tiny):
    """A bfloat16 sum would stop growing at 256 tokens, and a float32 one depends on the order, which on a GPU is any."""
    builder = RowBuilder()
    ids = [number % 300 for number in range(2500)]
    builder.add_pair(ids[:2], ids[2:], ids[2:900], share_prompt=True)
    batch = builder.build()
    torch.manual_seed(0)
    logps = -10 * torch.rand(len(batch.targets))
    sums = answer_sums(logps, batch)
    chosen = logps[batch.answers == 0].tolist()
    assert sums[0].tolist() == pytest.approx([math.fsum(chosen[:898]), math.fsum(chosen[898:])], rel=1e-13)
    assert logps[batch.answers == 0].sum().item() != pytest.approx(math.fsum(chosen), rel=1e-13)
