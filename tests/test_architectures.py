"""What other architectures than Llama's do differently: windows, sinks, bounds, scales, recurrences; each row equals that row alone."""

import pytest
import torch
import transformers
from test_positions import SMALL, alone, assert_equals_each_alone, draw, model_of, pack_rows
from transformers import AttentionInterface

from posttrain.data.packing import MicroBatch, RowBuilder
from posttrain.model import proof
from posttrain.model.classes import freeze_all_but_text
from posttrain.model.policy import Policy, build_policy, fastest_policy
from posttrain.operators import attention_segments, mixers
from posttrain.operators.attention_segments import SEGMENTS, attend_on_cpu, attend_segments, in_chunks, segments_of
from posttrain.operators.logprob import Way, token_logps

HEADS = {"head_dim": 8, "max_position_embeddings": 64}
GATED = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
BOTH = ["linear_attention", "full_attention"]
PACKED = {
    "a window": transformers.MistralConfig(**SMALL, sliding_window=5, max_position_embeddings=64),
    "windows in some layers": transformers.Gemma3TextConfig(
        **SMALL, **HEADS, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "windows and two bounds": transformers.Gemma2Config(
        **SMALL, **HEADS, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8
    ),
    "windows and sinks": transformers.GptOssConfig(**SMALL, **HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "chunks": transformers.Llama4TextConfig(
        **SMALL,
        **HEADS,
        attention_chunk_size=6,
        intermediate_size_mlp=48,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "a scaled head": transformers.CohereConfig(**SMALL, logit_scale=3.0),
    "a divided head": transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "a head with a bias": transformers.PhiConfig(**SMALL),
    "no arguments for the attention": transformers.NemotronConfig(**SMALL, head_dim=8),
    "gated delta rule": transformers.Qwen3NextConfig(**SMALL, **HEADS, **GATED, **EXPERTS, layer_types=BOTH),
    "short convolutions": transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "Mamba 2": transformers.FalconH1Config(
        **SMALL, head_dim=8, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=8, mamba_n_groups=1
    ),
}
APART = {
    "an attention of its own": transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
    "a head of several layers": transformers.ModernBertDecoderConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
}
each_packed = pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)


def policy_of(config) -> Policy:
    """A policy whose vectors, many of which start at ones and zeros, are random."""
    return build_policy(model_of(config), SEGMENTS, checks=True)


def pair(prompt: list[int], answers: list[list[int]], share: bool) -> MicroBatch:
    builder = RowBuilder()
    builder.add_pair(prompt, *answers, share)
    builder.add_sequence(prompt[::-1], prompt[::-1])  # which must not see what the pair leaves behind
    return builder.build()


@each_packed
def test_packed_rows_are_those_of_each_alone(config):
    policy, rows = policy_of(config), draw(13, 4, 21, 1, 9)
    assert policy.way.is_packed and not policy.why_slower
    expected = [alone(config, ids) if len(ids) > 1 else (torch.zeros(0), 0) for ids in rows]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2]):
        assert_equals_each_alone(policy, pack_rows([rows[i] for i in order]), [expected[i] for i in order])


@each_packed
def test_a_pair_that_shares_its_prompt_is_that_with_two_prompts(config):
    """Also where the prompt ends within the window, the chunk or the convolution of an answer, and the gradient comes back through both."""
    policy = policy_of(config)
    for sizes in ((14, 3, 9), (3, 11, 1), (1, 2, 7)):
        prompt, *answers = draw(*sizes)
        expected = [*(alone(config, prompt + answer, len(answer)) for answer in answers)]
        expected += [alone(config, prompt[::-1])] if len(prompt) > 1 else []
        for share in (False, True):
            assert_equals_each_alone(policy, pair(prompt, answers, share), expected)


@pytest.mark.parametrize("config", APART.values(), ids=APART)
def test_what_cannot_be_packed_is_computed_a_row_at_a_time(config):
    policy = policy_of(config)
    assert not policy.way.is_packed and policy.why_slower.startswith("not packed: its ")
    rows = draw(13, 4, 21, 9)
    assert_equals_each_alone(policy, pack_rows(rows), [alone(config, ids) for ids in rows])
    prompt, *answers = draw(7, 3, 9)
    expected = [*(alone(config, prompt + answer, len(answer)) for answer in answers), alone(config, prompt[::-1])]
    assert_equals_each_alone(policy, pair(prompt, answers, True), expected)


@pytest.mark.parametrize("config", [*PACKED.values(), *APART.values()], ids=[*PACKED, *APART])
def test_all_of_a_model_that_reads_text_alone_is_trained(config):
    assert freeze_all_but_text(model_of(config)) == 0


def test_a_gradient_that_is_wrong_is_seen_at_load():
    """Its log-probs are right: the values of the packed pass alone would say nothing."""
    config = PACKED["a window"]

    def halved(*inputs, **settings):
        output, _ = attend_segments(*inputs, **settings)
        return output * 0.5 + (output * 0.5).detach(), None

    AttentionInterface.register(SEGMENTS, halved)
    try:
        policy = policy_of(config)
    finally:
        AttentionInterface.register(SEGMENTS, attend_segments)
    assert not policy.way.is_packed
    assert "not packed: the gradient of " in policy.why_slower
    assert policy.model.config.sliding_window == 5


def test_the_proof_shortens_windows_so_that_its_rows_are_longer(monkeypatch):
    config = transformers.MistralConfig(**SMALL, sliding_window=4096, max_position_embeddings=8192)
    seen = []
    real = attention_segments._group
    monkeypatch.setattr(attention_segments, "_group", lambda *inputs: seen.append(inputs[2]) or real(*inputs))
    policy = policy_of(config)
    assert set(seen) == {proof.SHORT} and policy.model.config.sliding_window == 4096
    assert all(layer.self_attn.sliding_window == 4096 for layer in policy.model.model.layers if hasattr(layer.self_attn, "sliding_window"))


def test_a_window_and_sinks_on_the_cpu_equal_every_score_in_memory():
    """Grouped heads, shared prompts, a window that ends inside a prompt; values and gradients, those of the sinks, too."""
    torch.manual_seed(0)
    batch = pair([1, 2, 3, 4, 5, 6, 7], [[1, 2], [3, 4, 5, 6]], True)
    rows = batch.input_ids.shape[1]
    inputs = [torch.randn(1, heads, rows, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    segments, weights = batch.packing.segments, torch.randn(1, rows, 4, 8, dtype=torch.float64)
    for window in (0, 1, 3, 5, 100):
        fast = attend_on_cpu(*inputs, segments, 0.4, window, sinks)[0]
        rule = attention_segments.Asked(window=window, sinks=sinks)
        plain = attention_segments._attend_plainly(*inputs, segments, 0.4, 0.0, rule)
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)
        found, expected = (torch.autograd.grad((one * weights).sum(), [*inputs, sinks]) for one in (fast, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.library.opcheck(attend_on_cpu, (*inputs, segments, 0.4, 3, sinks))


def test_chunks_cut_segments_at_multiples_of_their_size():
    packing = pair([1, 2, 3, 4, 5], [[1, 2], [3, 4, 5, 6]], True).packing
    assert packing.segments.tolist() == [[0, 7, 0, 0], [7, 11, 0, 5], [11, 16, 0, 0]]
    # positions 0 to 3 | 4 to 6 of prompt and chosen; 5 to 7 | 8 of rejected, whose first chunk sees position 4 of the prompt
    assert segments_of(packing, 4).tolist() == [[0, 4, 0, 0], [4, 7, 0, 0], [7, 10, 4, 5], [10, 11, 0, 0], [11, 15, 0, 0], [15, 16, 0, 0]]
    assert in_chunks(packing, 4).max_k == 4 and segments_of(packing, 0) is packing.segments


@pytest.mark.parametrize(("scale", "cap", "has_bias"), [(0.3, 0.0, False), (1.0, 2.0, False), (1.0, 0.0, True), (0.7, 1.5, True)])
@pytest.mark.parametrize("piece", [2**26, 64])
def test_the_head_differentiates_scale_bound_and_bias(scale, cap, has_bias, piece):
    """In one piece, and in several."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((11, 6), (23, 6), (23,)))
    targets, given = torch.randint(23, (11,)), torch.randn(11)
    logits = (hidden @ weight.t() + (bias if has_bias else 0)) * scale
    logits = torch.tanh(logits / cap) * cap if cap else logits
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    found = token_logps(hidden, weight, targets, Way(piece=piece), bias if has_bias else None, scale, cap)
    torch.testing.assert_close(found, expected)
    inputs = (hidden, weight, bias) if has_bias else (hidden, weight)
    right = torch.autograd.grad((expected * given).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((found * given).sum(), inputs), right, rtol=1e-5, atol=1e-5)


def test_layers_that_pass_on_a_state_are_found_whatever_they_are_called():
    found = {
        name: {type(mixer).__name__ for mixer in mixers.mixers_of(fastest_policy(model_of(config), SEGMENTS).model)}
        for name, config in PACKED.items()
    }
    assert {name: kinds for name, kinds in found.items() if kinds} == {
        "gated delta rule": {"Qwen3NextGatedDeltaNet"},
        "short convolutions": {"Lfm2ShortConv"},
        "Mamba 2": {"FalconH1Mixer"},
    }
