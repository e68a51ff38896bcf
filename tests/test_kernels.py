"""Every fast way of computing is the slow one in value and gradient, and one that is not is refused before it is used."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, launch, rank_environment
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from posttrain.model.loading import load_model
from posttrain.operators import attention, layers, logprob
from posttrain.operators.attention_segments import _attend_anywhere, attend_segments
from posttrain.operators.saved_form import as_saved, count_as_saved, widen_feed_forward

CPU = torch.device("cpu")


def load(tiny, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(tiny.base, dtype=dtype)


def gap(expected: torch.Tensor, seen: torch.Tensor) -> float:
    return ((expected.double() - seen.double()).norm() / expected.double().norm()).item()


def by_autograd(module, query, key, value, attention_mask, scaling, packing, **_):
    return _attend_anywhere(query, key, value, packing.segments, scaling, 0.0), None


def aligned_to_the_start(module, query, key, value, attention_mask, scaling, packing, **_):
    """What a kernel does that aligns its causal mask to the start of the keys: an answer would see no more than its prompt's start."""
    segments = packing.segments.clone()
    segments[:, 3] = torch.maximum(segments[:, 2], segments[:, 3] - (segments[:, 1] - segments[:, 0]))
    return _attend_anywhere(query, key, value, segments, scaling, 0.0), None


def no_gradients(module, query, *others, **_):
    output, _ = by_autograd(module, query, *others)
    output.register_hook(lambda grad: grad * torch.nan)
    return output, None


def test_attention_must_agree_with_the_yardstick(tiny):
    config = load(tiny).config
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, attention.SAME)):
        expected = attention.trial(attend_segments, config, CPU, dtype)
        assert layers.distances(expected, attention.trial(by_autograd, config, CPU, dtype)).max() < limit
        assert layers.distances(expected, attention.trial(aligned_to_the_start, config, CPU, dtype)).max() > 10 * attention.SAME
        assert not layers.distances(expected, attention.trial(no_gradients, config, CPU, dtype)).max() <= attention.SAME


@pytest.mark.parametrize("bias", [True, False])
def test_products_in_float32_are_those_of_bfloat16_rounded_once(bias):
    torch.manual_seed(0)
    plain = nn.Linear(37, 11, bias=bias, dtype=torch.bfloat16)
    exact = nn.Linear(37, 11, bias=bias, dtype=torch.float64)
    exact.load_state_dict(plain.state_dict())
    x, grad = torch.randn(3, 5, 37).bfloat16(), torch.randn(3, 5, 11).bfloat16()
    plain.__class__ = layers.Float32Linear
    outcomes = []
    for layer, dtype in ((exact, torch.float64), (plain, torch.bfloat16)):
        mine = x.to(dtype).requires_grad_()
        output = layer(mine)
        outcomes.append([output.detach(), *torch.autograd.grad(output, [mine, *layer.parameters()], grad.to(dtype))])
    for expected, seen in zip(*outcomes, strict=True):
        assert seen.dtype == torch.bfloat16
        assert torch.equal(seen, expected.to(torch.bfloat16)) or gap(expected, seen) < 2e-3


def test_products_in_float32_throughout(tiny, cpu_has_bfloat16):
    """The path of CPUs without instructions for bfloat16, whatever this one has: every linear layer, attention and the head."""
    cpu_has_bfloat16(False)
    model = load(tiny)
    assert re.match(r"products in float32, .* \(relative error \S+, transformers' own \S+\)$", layers.choose(model, "auto", False, CPU)[0])
    assert all(type(m) is layers.Float32Linear for m in model.base_model.modules() if isinstance(m, nn.Linear))
    exact = attention.trial(attend_segments, model.config, CPU, torch.float32)
    assert layers.distances(exact, attention.trial(attend_segments, model.config, CPU, torch.bfloat16)).max() < 0.01
    hidden, weight = torch.randn(7, 16).bfloat16().requires_grad_(), torch.randn(64, 16).bfloat16().requires_grad_()
    outcomes = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        logps = logprob.token_logps(*inputs, torch.arange(7))
        outcomes.append([logps.detach(), *torch.autograd.grad(logps.sum(), inputs)])
    assert all(gap(*pair) < 4e-3 for pair in zip(*outcomes, strict=True))


def test_kernels_torch_changes_nothing(tiny):
    model = load(tiny)
    assert layers.choose(model, "torch", False, CPU)[0] == "transformers' own (kernels=torch)"
    assert not any(type(m) is layers.Float32Linear for m in model.modules())
    head = model.get_output_embeddings()
    head.__class__ = logprob.LogProbHead
    assert head.choose("torch", CPU, 0.0) == "in pieces, never all logits at once (kernels=torch)"
    assert head.way == logprob.PLAIN


def another_epsilon(model):
    model.base_model.layers[0].self_attn.k_norm.variance_epsilon = 1.0


def no_gradient(model):
    norm = model.base_model.layers[0].input_layernorm
    forward = norm.forward
    norm.forward = lambda hidden: _NoGradient.apply(forward(hidden))


class _NoGradient(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: grad * torch.nan)


def breaks_half_way(model):
    another_epsilon(model)
    raise RuntimeError("no compiler")


@pytest.mark.parametrize("change", [another_epsilon, no_gradient, breaks_half_way])
def test_wrong_kernels_in_a_layer_leave_it_as_it_was(tiny, monkeypatch, cpu_has_bfloat16, change):
    cpu_has_bfloat16(False)
    monkeypatch.setattr(layers, "_multiply_in_float32", change)
    model = load(tiny)
    before = layers.trial(model, model.base_model.layers[0], 5, CPU)
    chosen, _ = layers.choose(model, "auto", False, CPU)
    seen = "no compiler" if change is breaks_half_way else r"a layer's \S+ has relative error \S+, transformers' own \S+"
    assert re.fullmatch(rf"transformers' own \(not products in float32, .*: {seen}\)", chosen)
    after = layers.trial(model, model.base_model.layers[0], 5, CPU)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "forward" not in vars(model.base_model.layers[0].input_layernorm)


def odd_model() -> PreTrainedModel:
    shape = {"hidden_size": 32, "intermediate_size": 45, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=99, mlp_bias=True)).eval()


def test_a_widened_feed_forward_trains_as_the_narrow_one_and_keeps_its_zeros():
    narrow, wide = odd_model(), odd_model()
    for model in (narrow, wide):
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.up_proj.bias, generator=torch.Generator().manual_seed(1))
    assert "width 45 is padded with zeros to 128" in widen_feed_forward(wide)
    assert widen_feed_forward(load_even()) is None
    ids = torch.randint(99, (1, 40))
    for model in (narrow, wide):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = narrow.state_dict()
    assert count_as_saved(wide) == narrow.num_parameters() < wide.num_parameters()
    for name, parameter in wide.named_parameters():
        saved = as_saved(name, parameter.detach(), wide.config)
        torch.testing.assert_close(saved, expected[name], rtol=1e-4, atol=1e-5)
        assert parameter.count_nonzero() == saved.count_nonzero(), name  # the rest is zeros


def load_even() -> PreTrainedModel:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.mark.slow
def test_a_run_of_an_odd_width_leaves_models_of_that_width(tiny, tmp_path):
    """Through ZeRO-3 on two ranks, a checkpoint, another start at another stage, final/, and the model in a checkpoint."""
    config = AutoConfig.from_pretrained(tiny.base)
    config.intermediate_size = 45
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer.save_pretrained(tmp_path / "base")
    command = ["posttrain/sft.py", f"--checkpoint_path={tmp_path}/base", f"--sft_data_dir={tiny.sft}", f"--out_dir={tmp_path}/run"]
    command += [
        "--global_batch_size=8",
        "--warmup_iters=0",
        "--learning_rate=1e-2",
        "--dtype=float32",
        "--eval_interval=0",
        "--min_lr=1e-3",
    ]
    done = launch(*command, "--max_iters=2", "--ds_config=ds_configs/zero3.json")
    assert done.returncode == 0, done.stdout
    assert "width 45 is padded with zeros to 128" in done.stdout
    assert f"{AutoModelForCausalLM.from_config(config).num_parameters():,} parameters" in done.stdout
    done = launch(*command, "--max_iters=3", "--extend", "--ds_config=ds_configs/zero1.json")
    assert done.returncode == 0, done.stdout
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").state_dict()
    assert final["model.layers.0.mlp.down_proj.weight"].shape == (config.hidden_size, 45)
    saved = load_model(str(tmp_path / "run" / "checkpoints" / "step_000003"), torch.float32, "").state_dict()
    assert saved.keys() == final.keys()
    assert all(torch.equal(saved[name], final[name]) for name in final)


@pytest.mark.slow
def test_compiled_log_probs_equal_plain_ones():
    """What GPUs run, compiled for this CPU: some rows at a time, and some columns, with targets within and outside."""
    assert logprob.disagreement(logprob.Way(compiled=True), CPU, torch.bfloat16) < logprob.SAME
    assert logprob.disagreement(logprob.Way(compiled=True), CPU, torch.float32) < 1e-5
    few = logprob.Way(compiled=True, piece=1531 * 10)
    assert logprob.disagreement(few, CPU, torch.float32) < 1e-5
    assert logprob.disagreement(few, CPU, torch.float32, rows=2, width=5, vocabulary=7) < 1e-5


FORGOTTEN_KERNELS = """
import os, sys
import psutil, torch
from posttrain.engine.start import start_distributed
start_distributed()
weight = torch.randn(512, 512, dtype=torch.bfloat16)
for rows in range(300, 1300):
    torch.nn.functional.linear(torch.randn(rows, 512, dtype=torch.bfloat16), weight)
    if rows == 600:
        before = psutil.Process().memory_info().rss
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(layers.multiplies_in_float32(CPU, torch.bfloat16), reason="this CPU has no bfloat16 kernels to keep")
def test_memory_does_not_grow_with_the_number_of_different_micro_batches():
    """Each has a number of rows of its own, for which oneDNN makes a kernel: 700 more of them, kept, take 400 MB."""
    done = subprocess.run([sys.executable, "-c", FORGOTTEN_KERNELS], cwd=ROOT, env=rank_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 120
