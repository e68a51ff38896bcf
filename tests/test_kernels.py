"""Every fast way of computing is the slow one in value and gradient, and one that is not is refused before it is used."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from posttrain import attention, layers, logprob

CPU = torch.device("cpu")


def load(tiny, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(tiny.base, dtype=dtype)


def gap(expected: torch.Tensor, seen: torch.Tensor) -> float:
    return ((expected.double() - seen.double()).norm() / expected.double().norm()).item()


def by_autograd(module, query, key, value, attention_mask, scaling, packing, **_):
    return attention._attend_anywhere(query, key, value, packing.segments, scaling, 0.0), None


def aligned_to_the_start(module, query, key, value, attention_mask, scaling, packing, **_):
    """What a kernel does that aligns its causal mask to the start of the keys: an answer would see no more than its prompt's start."""
    segments = packing.segments.clone()
    segments[:, 3] = torch.maximum(segments[:, 2], segments[:, 3] - (segments[:, 1] - segments[:, 0]))
    return attention._attend_anywhere(query, key, value, segments, scaling, 0.0), None


def test_attention_must_agree_with_the_yardstick(tiny):
    config = load(tiny).config
    assert attention.disagreement(by_autograd, config, CPU, torch.float32) < 1e-5
    assert attention.disagreement(by_autograd, config, CPU, torch.bfloat16) < attention.SAME
    assert attention.disagreement(aligned_to_the_start, config, CPU, torch.bfloat16) > 10 * attention.SAME


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


def test_a_layer_that_multiplies_in_float32(tiny, monkeypatch):
    """The path of CPUs without instructions for bfloat16, whatever this one has: attention, head and every linear layer."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    layers.multiplies_in_float32.cache_clear()
    model = load(tiny)
    before = layers.trial(model)
    assert "products in float32" in layers.choose(model, "auto", compiled=False)
    assert all(type(m) is layers.Float32Linear for m in model.base_model.modules() if isinstance(m, nn.Linear))
    exact = layers.trial(load(tiny, torch.float32))
    for name, seen in layers.trial(model).items():
        assert gap(exact[name], seen) < 0.02 > gap(before[name], seen), name
    assert attention.disagreement(by_autograd, model.config, CPU, torch.bfloat16) < attention.SAME
    layers.multiplies_in_float32.cache_clear()


def test_kernels_torch_changes_nothing(tiny):
    model = load(tiny)
    assert layers.choose(model, "torch", compiled=False) == "transformers' own (kernels=torch)"
    assert not any(type(m) is layers.Float32Linear for m in model.modules())
    head = model.get_output_embeddings()
    head.__class__ = logprob.LogProbHead
    assert head.choose("torch") == "in pieces, without all logits (kernels=torch)"
    assert not head.in_float32


def test_wrong_kernels_in_a_layer_are_refused(tiny):
    def change(model):
        model.base_model.layers[0].self_attn.k_norm.variance_epsilon = 1.0

    with pytest.raises(ValueError, match=r"a layer of Qwen3ForCausalLM .* most in self_attn\S+. Set --kernels=torch"):
        layers._proven(load(tiny), change)


@pytest.mark.slow
def test_compiled_log_probs_equal_plain_ones(monkeypatch):
    """What GPUs run, compiled for this CPU: some rows at a time, and some columns, with targets within and outside."""
    assert logprob.disagreement(CPU, torch.bfloat16) < logprob.SAME
    assert logprob.disagreement(CPU, torch.float32) < 1e-5
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", 1531 * 10)
    assert logprob.disagreement(CPU, torch.float32) < 1e-5
    assert logprob.disagreement(CPU, torch.float32, rows=2, width=5, vocabulary=7) < 1e-5
