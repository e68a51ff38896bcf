"""Rotary frequencies that depend on a row, windows, and how many positions a row may have; architectures that are not Llama's."""

import types

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, PhimoeConfig

from posttrain.data.packing import MicroBatch, RowBuilder
from posttrain.data.prepared import load_prepared
from posttrain.evaluation.pairs import answer_logp
from posttrain.model import assistant
from posttrain.model.policy import Policy, build_policy, checkpoint_activations, fastest_policy, set_dropout
from posttrain.operators import layers, positions
from posttrain.operators.attention_segments import SEGMENTS
from posttrain.planning.activations import count_working, possible_ways
from posttrain.serving.batching import Batcher
from posttrain.training.inputs import check_positions

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 5.0, 6.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
# their frequencies change beyond 16 positions
CONFIGS = {
    "longrope": LlamaConfig(**SMALL, rope_parameters=LONG | {"original_max_position_embeddings": 16}, max_position_embeddings=64),
    "longrope of Phi3": Phi3Config(**SMALL, rope_parameters=LONG, max_position_embeddings=64, original_max_position_embeddings=16),
    "longrope of Phimoe": PhimoeConfig(
        **SMALL,
        rope_parameters=LONG | {"original_max_position_embeddings": 16, "short_mscale": 1.1, "long_mscale": 1.3},
        max_position_embeddings=64,
        num_local_experts=2,
    ),
    "dynamic": LlamaConfig(**SMALL, rope_parameters=DYNAMIC, max_position_embeddings=16),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(config) -> transformers.PreTrainedModel:
    """The config's random model, the same each time, as transformers makes it: it has seen no row yet."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict())).float().eval()


def draw(*lengths: int) -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(99, (length,)).tolist() for length in lengths]


def pack_rows(rows: list[list[int]]) -> MicroBatch:
    builder = RowBuilder()
    for ids in rows:
        builder.add_sequence(ids, ids)
    return builder.build()


def alone(config, ids: list[int], trained: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a row's last `trained` tokens by a model that reads no other, and the gradient of all its weights."""
    model, trained = model_of(config), trained or len(ids) - 1
    logits = model(input_ids=torch.tensor([ids])).logits[0, -trained - 1 : -1]
    logps = logits.log_softmax(-1).gather(1, torch.tensor(ids[-trained:])[:, None]).squeeze(1)
    logps.sum().backward()
    return logps.detach(), gradient(model)


def gradient(model) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def assert_equals_each_alone(policy: Policy, batch: MicroBatch, expected: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    policy.zero_grad()
    logps = policy(batch)
    logps.sum().backward()
    torch.testing.assert_close(logps.detach(), torch.cat([values for values, _ in expected]), rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient(policy.model), sum(grads for _, grads in expected), rtol=1e-4, atol=1e-4)


@each_config
def test_an_example_has_the_frequencies_that_it_has_alone(config):
    """Rows below, at and beyond the change, in both orders, one micro-batch after another: also what came before does not matter."""
    rows = draw(5, 16, 17, 40, 23, 9)
    expected = [alone(config, ids) for ids in rows]
    policy = fastest_policy(model_of(config), SEGMENTS)
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3], [4], [0], [2, 5]):
        assert_equals_each_alone(policy, pack_rows([rows[i] for i in order]), [expected[i] for i in order])


@each_config
def test_a_pair_shares_its_prompt_where_that_has_the_same_frequencies_with_both_answers(config):
    prompt, chosen, rejected, long, longer = draw(9, 3, 7, 14, 25)

    def packed(first: list[int], second: list[int], share: bool) -> MicroBatch:
        builder = RowBuilder()
        builder.add_pair(prompt, first, second, share)
        return builder.build()

    policy = fastest_policy(model_of(config), SEGMENTS)
    for pair, may_share in (((chosen, rejected), True), ((long, long[::-1]), True), ((chosen, long), False), ((longer, chosen), False)):
        expected = [alone(config, prompt + answer, len(answer)) for answer in pair]
        assert_equals_each_alone(policy, packed(*pair, share=False), expected)
        if may_share:
            assert_equals_each_alone(policy, packed(*pair, share=True), expected)
        else:
            with pytest.raises(ValueError, match="set share_prompt: False"):
                policy(packed(*pair, share=True))


@each_config
def test_the_proof_at_load_sees_frequencies_of_the_whole_micro_batch(config, monkeypatch):
    assert build_policy(model_of(config), SEGMENTS, checks=True).way.is_packed
    monkeypatch.setattr(positions.RowFrequencies, "_runs", lambda self, config, layer_type, rows: [(0, rows)])
    policy = build_policy(model_of(config), SEGMENTS, checks=True)
    assert not policy.way.is_packed and "not packed: its log-probs differ from transformers' own" in policy.why_slower
    rows = draw(5, 16, 17, 40, 23, 9)
    assert_equals_each_alone(policy, pack_rows(rows), [alone(config, ids) for ids in rows])


def test_a_pair_that_cannot_share_its_prompt_is_named(tiny):
    data = load_prepared(tiny.dpo, "dpo", "")
    chosen, rejected = (data.train.token_counts("prompt") + data.train.token_counts(name) for name in ("chosen", "rejected"))
    between = int(np.median(chosen))
    changes_there = LlamaConfig(rope_parameters=LONG | {"original_max_position_embeddings": between}, max_position_embeddings=256)
    crossing = (chosen > between) != (rejected > between)
    with pytest.raises(ValueError, match=rf"dpo.jsonl:\d+\) has .* share_prompt: False \({crossing.sum()} such pairs\)"):
        check_positions(data, changes_there)
    check_positions(load_prepared(tiny.dpo, "dpo", "", share_prompt=False), changes_there)


ROPES = {
    512: {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    1024: {"type": "yarn", "factor": 8.0},  # as config.json had it before transformers 5; of max_position_embeddings
    640: {"rope_type": "linear", "factor": 5.0, "original_max_position_embeddings": 128},
    384: {"rope_type": "dynamic", "factor": 3.0},
    768: LONG | {"factor": 12.0, "original_max_position_embeddings": 64},
    128: {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},  # never less than config.json says
    256: {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize(("most", "rope"), ROPES.items())
def test_a_scaled_rotary_embedding_has_more_positions(most, rope):
    config = LlamaConfig(**SMALL, max_position_embeddings=128, rope_theta=1e4, rope_scaling=rope)
    assert positions.longest_position(config) == positions.context_of(config) == most


def test_a_limit_that_may_be_scaled_already_is_not_scaled_again():
    """deepseek-coder's config.json has factor 4 beside the 16,384 positions that this factor makes of 4,096."""
    config = LlamaConfig(**SMALL, max_position_embeddings=128, rope_theta=1e4, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert positions.longest_position(config) == 128


def test_other_position_encodings_have_their_own_limit_or_none():
    assert positions.longest_position(LlamaConfig(max_position_embeddings=77)) == 77
    assert positions.longest_position(GPT2Config(n_positions=66)) == 66
    assert positions.longest_position(transformers.BloomConfig()) is None
    assert positions.context_of(transformers.BloomConfig()) == positions.ASSUMED_CONTEXT


def test_texts_are_read_together_up_to_where_their_frequencies_are_the_same(tiny, tmp_path):
    """Alone a text may be longer, and has its own frequencies whatever was read before."""
    config = LlamaConfig(**SMALL | {"vocab_size": len(tiny.tokenizer)}, rope_parameters=DYNAMIC, max_position_embeddings=16)
    model_of(config).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = assistant.load(str(tmp_path))
    assert (loaded.context, loaded.context_in_batches) == (48, 16)
    rows = draw(40, 20, 8)
    seen = [answer_logp(loaded.model, ids[:2], ids[2:]) for ids in rows]
    assert seen == pytest.approx([alone(config, ids, len(ids) - 2)[0].sum().item() for ids in rows], abs=1e-4)


GPT2 = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
OPT = transformers.OPTConfig(vocab_size=99, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
BLOOM = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, attention_dropout=0.1)
SEED = transformers.SeedOssConfig(**SMALL, head_dim=8, residual_dropout=0.5, attention_dropout=0.5)


@pytest.mark.parametrize(("config", "ways"), [(GPT2, ["selective", "full"]), (OPT, ["full"]), (SEED, ["selective", "full"])])
def test_recomputing_changes_no_gradient_and_no_dropout_is_left_on(config, ways):
    """With layers that are not base_model.layers, and with dropout that is a number of a module and not a module."""
    batch = pack_rows(draw(20, 7))
    gradients = []
    for way in ("none", *ways):
        policy = build_policy(model_of(config), SEGMENTS, checks=True)
        set_dropout(policy.model, 0.0)
        checkpoint_activations(policy.model, way)
        policy.train()(batch).sum().backward()
        gradients.append(gradient(policy.model))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    assert possible_ways(config, ("none", "selective", "full")) == ["none", *ways]
    assert len(layers.decoder_layers(policy.model)) == 2


def test_what_an_architecture_cannot_do_is_said_by_name():
    with pytest.raises(ValueError, match=r"activation_checkpointing=selective .* OPTForCausalLM .*take full or none"):
        checkpoint_activations(model_of(OPT), "selective")
    set_dropout(model_of(BLOOM), 0.0)
    with pytest.raises(ValueError, match="OPTForCausalLM has no attention dropout"):
        set_dropout(model_of(OPT), 0.1)
    with pytest.raises(ValueError, match="BloomForCausalLM, whose attention is its own"):
        Batcher(types.SimpleNamespace(name="mine", model=model_of(BLOOM)), 1)


@pytest.mark.parametrize("fused", [False, True])
def test_the_planner_counts_layers_of_any_name_and_rotary_embeddings_of_any_kind(fused):
    batch = pack_rows(draw(20, 7))
    plain = LlamaConfig(**SMALL)
    expected = count_working(plain, batch, torch.bfloat16, "none", fused)
    for config in (CONFIGS["longrope"], CONFIGS["dynamic"]):
        assert count_working(config, batch, torch.bfloat16, "none", fused) == expected
    none, selective, full = (count_working(GPT2, batch, torch.bfloat16, way, fused).most for way in ("none", "selective", "full"))
    assert none > selective > full
    assert count_working(BLOOM, batch, torch.bfloat16, "none", fused=False).most > 0
