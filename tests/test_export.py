"""What is written is what was trained: bases of several kinds through training into final/, opened by others."""

import json
import os
import subprocess
import sys

import bases
import pytest
import torch
from conftest import launch
from exported import CASES
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from posttrain.data.tokenization import fingerprint, load_tokenizer
from posttrain.model import export
from posttrain.model.loading import load_model
from posttrain.model.sample_rows import SampleRow, plain_logps, sample_rows

MAKERS = {
    "activation_buffers": bases.with_activation_buffers,
    "router_bias": bases.with_router_bias,
    "tied_by_flag_only": bases.tied_by_flag_only,
    "released": bases.as_released,
}


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    (folder / "tiny").symlink_to(tiny.folder)
    for name in CASES:
        (folder / name).mkdir()
        if name in MAKERS:
            MAKERS[name](tiny, folder / name / "base")
    done = launch("tests/exported.py", str(folder))
    assert done.returncode == 0, done.stdout
    return folder


def opened(folder, dtype=torch.float32):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def logps(model) -> torch.Tensor:
    return torch.cat([plain_logps(model, row) for row in sample_rows(model.config)])


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_opens_what_was_trained(results, name):
    """Every tensor bit for bit, parameters and buffers, and the log-probs of the engine; a checkpoint gives the same model."""
    trained, dtype = torch.load(results / name / "trained.pt"), getattr(torch, CASES[name][1])
    model = opened(results / name / "final", dtype)
    there = model.state_dict()
    for tensor, values in trained["after"].items():
        assert torch.equal(there[tensor], values), tensor
    assert (logps(model.float()) - trained["logps"]).abs().mean() < export.FARTHEST[dtype]
    again = load_model(str(results / name / "run" / "checkpoints" / "step_000002"), torch.float32, "")
    for tensor, values in trained["after"].items():
        assert torch.allclose(again.state_dict()[tensor].to(values.dtype), values, atol=1e-6), tensor


def test_buffers_are_those_of_the_base(results):
    for name, part in (("activation_buffers", ".act_fn.beta"), ("router_bias", "e_score_correction_bias")):
        base, final = (AutoModelForCausalLM.from_pretrained(results / name / place).state_dict() for place in ("base", "final"))
        seen = [tensor for tensor in base if tensor.endswith(part)]
        assert seen
        assert all(torch.equal(base[tensor].float(), final[tensor].float()) for tensor in seen)


def test_two_matrices_stay_two(results):
    config = json.loads((results / "tied_by_flag_only" / "final" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    trained = torch.load(results / "tied_by_flag_only" / "trained.pt")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= trained["after"].keys()


def test_every_embedding_that_data_uses_moves_in_every_stage(results, tiny):
    """The end token's in a second stage, too, although it is what the tokenizer pads with."""
    from posttrain.data.prepared import load_prepared

    used = sorted({token for row in load_prepared(tiny.sft, "sft", "").train for token in row["input_ids"]})
    assert tiny.chat.end_id in used
    for name in ("released", "released_again"):
        trained = torch.load(results / name / "trained.pt")
        before, after = (trained[when]["model.embed_tokens.weight"] for when in ("before", "after"))
        moved = (before - after).abs().amax(1)
        taken = torch.zeros(len(moved), dtype=torch.bool)
        taken[list(tokens_of_steps(tiny))] = True
        assert (moved[taken] > 5e-3).all(), name  # by weight decay alone about 1e-3


def tokens_of_steps(tiny) -> set[int]:
    """The input tokens of the two steps that exported.py makes."""
    from exported import RECIPE

    from posttrain.data import batches
    from posttrain.data.prepared import load_prepared

    train = load_prepared(tiny.sft, "sft", "").train
    rows = [int(i) for step in (1, 2) for i in batches.step_examples(len(train), RECIPE["global_batch_size"], 1337, step)]
    return {token for i in rows for token in train[i]["input_ids"][:-1]}


def test_final_carries_what_the_base_had(results, tiny):
    final = results / "released_again" / "final"  # through two stages
    generation, config = (json.loads((final / name).read_text()) for name in ("generation_config.json", "config.json"))
    assert bases.SAMPLING.items() <= generation.items()
    assert {tiny.chat.end_id, tiny.tokenizer.eos_token_id, 5} == set(generation["eos_token_id"])
    assert generation["eos_token_id"][0] == tiny.chat.end_id
    assert generation["pad_token_id"] == 0
    assert not {"max_new_tokens", "max_length"} & generation.keys()
    assert "auto_map" not in config and config["use_cache"]
    assert config.get("pad_token_id") not in (tiny.chat.end_id, tiny.tokenizer.eos_token_id)
    assert (config.get("rope_theta"), config.get("rope_scaling", {}).get("factor")) == (5e5, 8.0)
    assert fingerprint(load_tokenizer(final)) == fingerprint(tiny.tokenizer)
    settings = json.loads((final / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "pad_token" not in settings


def test_a_folder_that_opens_as_another_model_is_not_written(results, tiny, tmp_path, monkeypatch):
    """Neither one that lacks a tensor, nor one whose config makes another model of the right tensors. Without memory it is only said."""
    base = results / "activation_buffers" / "base"

    def write(change_state=lambda state: None, change_folder=lambda folder: None) -> str | None:
        model = load_model(str(base), torch.float32, "").eval()
        expected, state = logps(model), model.state_dict()
        change_state(state)

        def describe(folder):
            export.write_description(model, tiny.chat, folder)
            change_folder(folder)

        return export.write_model(model, state, describe, tmp_path / "final", "", expected)

    with pytest.raises(ValueError, match=r"final was not written: .* 2 missing_keys, first model.layers.0.mlp.act_fn.beta"):
        write(lambda state: [state.pop(name) for name in list(state) if name.endswith("act_fn.beta")])
    with pytest.raises(ValueError, match=r"final was not written: .* nats a token from those of the trained model"):
        write(change_folder=lambda folder: bases.edit(folder, {"rms_norm_eps": 0.5}))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export, "MEMORY", 1e9)
    assert "was not opened to compare it: that takes" in write(change_folder=lambda folder: bases.edit(folder, {"rms_norm_eps": 0.5}))
    monkeypatch.undo()
    assert write() is None
    assert (tmp_path / "final" / "model.safetensors").stat().st_mode & 0o077  # readable by others as the umask has it


# what transformers 4 would take for granted, were it not written in its own names
OTHERS = {
    "theta": ("qwen3", {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "yarn": ("llama", {"rope_parameters": bases.YARN}),
    "rotated_share": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}}),
    "two_bases": ("gemma3_text", {"head_dim": 8, "sliding_window": 8, "rope_parameters": bases.TWO_BASES}),
    "longrope": ("phi3", {"original_max_position_embeddings": 64, "pad_token_id": 0, "rope_parameters": bases.LONGROPE}),
    "experts": ("qwen3_moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "tied": ("llama", {"tie_word_embeddings": True}),
}
OPENED = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
found = {"version": __version__}
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    rows = [torch.arange(n) * 7919 % model.config.vocab_size for n in json.loads(sys.argv[1])]
    with torch.no_grad():
        logps = [model.eval()(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].tolist() for ids in rows]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ta ke"}], add_generation_prompt=True, tokenize=True)
    settings = model.generation_config.to_dict()
    absent = report["missing_keys"] + report["unexpected_keys"]
    found[folder] = {"logps": sum(logps, []), "absent": absent, "chat": chat, "settings": settings}
print(json.dumps(found))
"""


VLLM = """
import json, sys
from vllm.transformers_utils.config import get_config, try_get_generation_config
for folder in sys.argv[1:]:
    config, generation = (read(folder, trust_remote_code=False) for read in (get_config, try_get_generation_config))
    facts = {"rope": config.rope_parameters, "stops": config.eos_token_id, "dtype": str(config.dtype)}
    print(json.dumps([folder, facts | {"sampling": generation.to_diff_dict()}]))
"""


@pytest.fixture(scope="module")
def others(results, tiny, tmp_path_factory):
    """The folder of each of OTHERS as it is written, and the model that it was written from."""
    written = {}
    for name, (kind, settings) in OTHERS.items():
        place = tmp_path_factory.mktemp("others")
        base, final = bases.make(tiny, place / "base", kind, **settings), place / "final"
        model = load_model(str(base), torch.float32, "").eval()
        export.write_model(model, model.state_dict(), lambda into, of=model: export.write_description(of, tiny.chat, into), final, "")
        written[name] = (final, model)
    return written


def installed(folder, *packages: str) -> dict[str, str]:
    """Install packages into a folder; returns the environment that finds them first."""
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, "--target", str(folder), *packages]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{packages[-1]} cannot be had here")
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_transformers_4_opens_the_same_model(results, others, tiny, tmp_path):
    """Its log-probs, ids of a chat and sampling defaults are ours: no key of config.json is one that only transformers 5 knows."""
    environment = installed(tmp_path / "older", "transformers==4.57.6")
    engines = [name for name in CASES if name != "router_bias"]  # whose bfloat16 is rounded elsewhere
    lengths = (5, 13, 8)  # short enough that no frequencies depend on them

    def short_logps(model) -> torch.Tensor:
        rows = [SampleRow(torch.arange(n) * 7919 % model.config.vocab_size, n) for n in lengths]
        return torch.cat([plain_logps(model, row) for row in rows])

    expected = {str(results / name / "final"): short_logps(opened(results / name / "final")) for name in engines}
    expected |= {str(final): short_logps(model) for final, model in others.values()}
    command = [sys.executable, "-c", OPENED, json.dumps(lengths), *expected]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("version") == "4.57.6"
    asked = [{"role": "user", "content": "ta ke"}]
    chat = tiny.tokenizer.apply_chat_template(asked, chat_template=tiny.chat.jinja, add_generation_prompt=True, return_dict=False)
    for folder, seen in found.items():
        assert seen["absent"] == [], folder
        assert torch.allclose(torch.tensor(seen["logps"]), expected[folder], atol=0.02), folder  # Apertus' activation differs by 5e-3
        assert seen["chat"] == chat, folder
    assert bases.SAMPLING.items() <= found[str(results / "released" / "final")]["settings"].items()


@pytest.mark.slow
def test_vllms_config_reader_finds_the_same_settings(results, others, tmp_path):
    """It refuses where rope_type and its older name `type` disagree; sampling defaults come from generation_config.json."""
    environment = installed(tmp_path / "vllm", "--no-deps", "cbor2", "pyzmq", "openai-harmony", "vllm==0.33.0")
    folders = [*(final for final, _ in others.values()), *(results / name / "final" for name in CASES)]
    done = subprocess.run([sys.executable, "-c", VLLM, *map(str, folders)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert found.keys() == set(map(str, folders))
    for folder, seen in found.items():
        config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
        rope = {name: value for name, value in config.rope_parameters.items() if name != "type"}
        assert {name: value for name, value in seen["rope"].items() if name != "type"} == rope, folder
        assert seen["stops"] == config.eos_token_id and seen["dtype"] == str(config.dtype), folder
        assert seen["sampling"]["eos_token_id"] == generation.eos_token_id, folder
        assert not {"max_new_tokens", "max_length"} & seen["sampling"].keys(), folder
    assert bases.SAMPLING.items() <= found[str(results / "released" / "final")]["sampling"].items()
