"""Rank 0 alone reads a model, and the others get it from there: whole, or at ZeRO-3 their parts, without a whole copy on any rank."""

import copy
import json

import bases
import pytest
import torch
from conftest import launch
from test_plan import rows
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.model.policy import fastest_policy
from posttrain.operators.attention_segments import SEGMENTS
from posttrain.parallel import distribute
from posttrain.planning.activations import LiveBytes

DEEP = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
    """What two ranks saw of each base: its name -> rank -> whether it was sharded -> facts."""
    folder = tmp_path_factory.mktemp("distribute")
    made = [
        bases.make(tiny, folder / "deep", **DEEP),
        bases.make(tiny, folder / "tied", tie_word_embeddings=True),
        bases.with_activation_buffers(tiny, folder / "buffers"),
        bases.make(tiny, folder / "experts", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    ]
    done = launch("tests/distributed.py", folder / "out", *made)
    assert done.returncode == 0, done.stdout
    ranks = [json.loads((folder / f"out.{rank}").read_text()) for rank in (0, 1)]
    return {name: [one[name] for one in ranks] for name in ranks[0]}


@pytest.mark.parametrize("sharded", ["False", "True"])
@pytest.mark.parametrize("name", ["deep", "tied", "buffers", "experts"])
def test_every_rank_has_the_weights_that_rank_0_read(loaded, name, sharded):
    first, second = (one[sharded] for one in loaded[name])
    assert len(first["read"]) > 10
    assert first["now"] == second["now"] == second["read"] == first["read"]
    assert first["tied"] == second["tied"] == (name == "tied")
    assert first["groups"] == second["groups"] == loaded[name][0]["False"]["groups"]
    assert all(first["groups"])  # matrices, which decay, and others
    assert first["devices"] == second["devices"]
    assert len(first["devices"]) == 1 and first["devices"][0].startswith("cpu")


def test_no_rank_but_the_first_holds_more_than_its_part_and_one_weight(loaded):
    seen = loaded["deep"][1]["True"]
    whole, largest = sum(seen["sizes"]), max(seen["sizes"])
    assert largest < whole / 12
    assert seen["most"] < whole / 2 + 3 * largest
    assert loaded["deep"][1]["False"]["most"] > whole


def test_a_model_computes_on_a_device_that_has_room_for_one_of_its_weights_at_a_time():
    """Which is the CPU here: weights are copied to it all the same, and what lives of the copies is counted."""
    cpu, batch, live = torch.device("cpu"), rows(1, 3, 2), LiveBytes()
    policy = fastest_policy(LlamaForCausalLM(LlamaConfig(**DEEP, vocab_size=99)), SEGMENTS)
    live.leave_out(policy.parameters())
    before = {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}
    with torch.no_grad():
        expected = policy(batch)
        with live, distribute.computing_on(policy, cpu):
            seen = policy(batch)
    assert torch.equal(seen, expected)
    sizes = [parameter.nbytes for parameter in policy.parameters()]
    assert max(sizes) < live.most < 3 * max(sizes) < sum(sizes) / 10
    with pytest.raises(TypeError), distribute.computing_on(policy, cpu):
        policy.head(None)
    assert {name: parameter.data_ptr() for name, parameter in policy.named_parameters()} == before


def test_a_copy_without_weights_is_the_model_in_all_else():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**DEEP, vocab_size=99, tie_word_embeddings=True))
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    made = distribute.without_weights(model)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in made.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), copy.deepcopy(model).buffers(), strict=True))
    assert made.config.to_dict() == model.config.to_dict()
    assert not any(parameter.is_meta for parameter in model.parameters())
