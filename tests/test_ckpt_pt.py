"""ckpt.pt files compute what the original model computes; nothing but tensors is unpickled; tensors win over model_args."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from posttrain.model.ckpt_pt import load_ckpt_pt, save_ckpt_pt
from posttrain.model.forms import is_ckpt_pt
from posttrain.model.plain_llama import ckpt_pt_logits

VOCAB, DIM, HEADS, FF, LAYERS, LENGTH = 37, 24, 6, 20, 2, 16
IDS = torch.arange(12) * 7 % VOCAB
ARGS = {
    **{"block_size": LENGTH, "vocab_size": VOCAB, "n_layer": LAYERS, "n_head": HEADS, "n_embd": DIM, "normalization": "rmsnorm"},
    **{"norm_eps": 1e-5, "activation": "silu", "attention_backend": "sdpa", "num_key_value_heads": HEADS, "rope_theta": 500.0},
    **{"position_encoding": "rope", "norm_position": "pre", "ffn_type": "swiglu", "bias": False, "dropout": 0.0, "d_ff": FF},
    **{"weight_tying": False, "ffn_expansion_ratio": None, "attention_dropout": 0.0, "residual_dropout": 0.0},
}


def checkpoint(kv_heads=HEADS, tied=False, prefix="", **args):
    """Return a small checkpoint with random weights: fused c_attn when kv_heads == HEADS, else c_q and c_kv."""
    torch.manual_seed(1)
    state = {"token_embeddings.weight": torch.randn(VOCAB, DIM), "final_norm.weight": torch.rand(DIM) + 0.5}
    state["lm_head.weight"] = state["token_embeddings.weight"] if tied else torch.randn(VOCAB, DIM)
    kv = kv_heads * DIM // HEADS
    attention = {"c_attn": (3 * DIM, DIM)} if kv_heads == HEADS else {"c_q": (DIM, DIM), "c_kv": (2 * kv, DIM)}
    for i in range(LAYERS):
        shapes = {"ffn.w_gate": (FF, DIM), "ffn.w_value": (FF, DIM), "ffn.w_out": (DIM, FF), "attn.c_proj": (DIM, DIM)}
        shapes |= {f"attn.{name}": shape for name, shape in attention.items()} | {"norm1": (DIM,), "norm2": (DIM,)}
        state |= {f"blocks.{i}.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        state[f"blocks.{i}.attn.bias"] = torch.ones(1, 1, LENGTH, LENGTH)
    model_args = {**ARGS, "num_key_value_heads": kv_heads, "weight_tying": tied, **args}
    model = {prefix + name: tensor for name, tensor in state.items()}
    return {"model": model, "model_args": model_args, "iter_num": 3, "best_val_loss": torch.tensor(1.5)}


def write(tmp_path, content, name="ckpt.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize(("kv_heads", "tied"), [(HEADS, False), (HEADS, True), (2, True), (1, False)])
def test_computes_what_the_original_model_computes(tmp_path, kv_heads, tied):
    content = checkpoint(kv_heads, tied)
    model = load_ckpt_pt(write(tmp_path, content))
    torch.testing.assert_close(logits(model), ckpt_pt_logits(content, IDS), atol=1e-4, rtol=1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == LENGTH and not model.training
    for tensor in model.parameters():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), "a view of a larger tensor"
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", ["gqa_tied", "mha_untied"])
def test_shared_checkpoints_give_their_recorded_logits(shared_data, name):
    folder = shared_data / "seed_checkpoint"
    expected = json.loads((folder / f"{name}.expected.json").read_text())
    found = logits(load_ckpt_pt(folder / f"{name}.pt"), torch.tensor(expected["input_ids"]))
    torch.testing.assert_close(found[:, :8], torch.tensor(expected["logits_first8_of_each_position"]), atol=1e-4, rtol=0)
    assert found.argmax(-1).tolist() == expected["logits_argmax"]
    content = torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu")
    plain = ckpt_pt_logits(content, torch.tensor(expected["input_ids"]))  # what conversions are compared with
    torch.testing.assert_close(plain[:, :8], torch.tensor(expected["logits_first8_of_each_position"]), atol=1e-4, rtol=0)


def test_the_trained_checkpoint_tells_its_story(shared_data):
    model = load_ckpt_pt(shared_data / "seed_checkpoint" / "gqa_tied.pt")
    words = SentencePieceProcessor(model_file=str(shared_data / "seed_checkpoint" / "tok512.model"))
    out = model.generate(torch.tensor([[words.bos_id()]]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert words.decode(out[0].tolist()).startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize(("kv_heads", "tied"), [(HEADS, False), (2, True)])
def test_round_trips_are_exact(tmp_path, kv_heads, tied):
    content = checkpoint(kv_heads, tied)
    model = load_ckpt_pt(write(tmp_path, content))
    save_ckpt_pt(model, tmp_path / "again.pt", iter_num=7, best_val_loss=2.5)
    written = torch.load(tmp_path / "again.pt", weights_only=True)
    weights = {name for name in content["model"] if not name.endswith("attn.bias")}
    assert weights == {name for name in written["model"] if "rope" not in name}
    assert all(torch.equal(content["model"][name], written["model"][name]) for name in weights)
    assert written["model_args"] == content["model_args"] and written["iter_num"] == 7 and written["best_val_loss"] == 2.5
    again = load_ckpt_pt(tmp_path / "again.pt").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert os.listdir(tmp_path).count("again.pt") == 1 and not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_shared_checkpoint_is_written_back_with_every_tensor_it_had(shared_data, tmp_path):
    for name in ("gqa_tied.pt", "mha_untied.pt"):
        save_ckpt_pt(load_ckpt_pt(shared_data / "seed_checkpoint" / name), tmp_path / name)
        before, after = (torch.load(folder / name)["model"] for folder in (shared_data / "seed_checkpoint", tmp_path))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_bf16_loads_as_the_rounded_weights(tmp_path):
    path = write(tmp_path, checkpoint())
    rounded, exact = load_ckpt_pt(path, torch.bfloat16), load_ckpt_pt(path)
    assert rounded.config.dtype == rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.model.layers[0].self_attn.k_proj.weight, exact.model.layers[0].self_attn.k_proj.weight.bfloat16())
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_loading_does_not_touch_the_random_state_and_the_weights_are_not_the_files(tmp_path):
    path = write(tmp_path, checkpoint())
    content, state = path.read_bytes(), torch.get_rng_state()
    model = load_ckpt_pt(path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(state, torch.get_rng_state()) and path.read_bytes() == content


@pytest.mark.parametrize("loss", [np.float64(1.25), np.float32(1.25), None])
def test_a_numpy_scalar_loss_loads(tmp_path, loss):
    assert load_ckpt_pt(write(tmp_path, checkpoint() | {"best_val_loss": loss})).config.vocab_size == VOCAB


def test_the_scalar_of_an_older_numpy_loads(tmp_path):
    path = write(tmp_path, checkpoint() | {"best_val_loss": np.float64(1.25)}, "new.pt")
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for item in new.infolist():
            data = new.read(item)
            assert item.filename.count("data.pkl") == 0 or b"numpy._core.multiarray" in data
            old.writestr(item.filename, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_ckpt_pt(tmp_path / "old.pt").config.vocab_size == VOCAB


class Hostile:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_holds_code_is_refused_and_does_not_run(tmp_path, zipped):
    path, target = tmp_path / "ckpt.pt", tmp_path / "ran"
    torch.save(checkpoint() | {"config": Hostile(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"mkdir.*only tensors"):
        load_ckpt_pt(path)
    assert not target.exists()


def test_a_broken_file_is_refused(tmp_path):
    whole = write(tmp_path, checkpoint()).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"not a checkpoint at all"):
        (tmp_path / "cut.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.pt is (cut short|not a readable)"):
            load_ckpt_pt(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_ckpt_pt(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="found weight, bias"):
        load_ckpt_pt(write(tmp_path, torch.nn.Linear(2, 2).state_dict()))


def test_the_old_torch_format_loads(tmp_path):
    torch.save(checkpoint(), tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    assert load_ckpt_pt(tmp_path / "ckpt.pt").config.vocab_size == VOCAB


def test_compiled_models_keep_their_weights(tmp_path):
    plain, prefixed = checkpoint(), checkpoint(prefix="_orig_mod.")
    model = load_ckpt_pt(write(tmp_path, prefixed))
    torch.testing.assert_close(logits(model), ckpt_pt_logits(plain, IDS), atol=1e-4, rtol=1e-4)


def test_tensors_win_over_model_args_and_every_lie_is_named(tmp_path):
    lies = {"num_key_value_heads": 3, "d_ff": 6144, "vocab_size": 99, "n_layer": 5, "n_embd": 48, "weight_tying": True}
    content = checkpoint(**lies)
    with pytest.warns(UserWarning) as warned:
        model = load_ckpt_pt(write(tmp_path, content))
    text = " ".join(str(one.message) for one in warned)
    assert all(f"{key}={value}" in text for key, value in lies.items()), text
    torch.testing.assert_close(logits(model), ckpt_pt_logits(content, IDS), atol=1e-4, rtol=1e-4)


def test_a_tie_in_the_file_wins_over_model_args(tmp_path):
    with pytest.warns(UserWarning, match="weight_tying=False, but head and embedding are one tensor"):
        assert load_ckpt_pt(write(tmp_path, checkpoint(tied=True, weight_tying=False))).config.tie_word_embeddings


def test_equal_values_are_not_a_tie_when_model_args_says_so(tmp_path):
    content = checkpoint(tied=True, weight_tying=False)
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"].clone()
    assert not load_ckpt_pt(write(tmp_path, content)).config.tie_word_embeddings


def test_a_tied_head_may_be_absent_and_an_untied_one_may_not(tmp_path):
    content = checkpoint(tied=True)
    del content["model"]["lm_head.weight"]
    assert load_ckpt_pt(write(tmp_path, content)).config.tie_word_embeddings
    content["model_args"]["weight_tying"] = False
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        load_ckpt_pt(write(tmp_path, content))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("normalization", "layernorm"), ("activation", "gelu"), ("ffn_type", "standard"), ("position_encoding", "learned")),
        *(("norm_position", "post"), ("bias", True)),
    ],
)
def test_what_llama_cannot_express_is_refused_by_name(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
        load_ckpt_pt(write(tmp_path, checkpoint(**{key: value})))


def test_other_spellings_are_understood_and_unknown_settings_are_named(tmp_path):
    spelled = {"normalization": "RMSNorm", "activation": "SiLU", "position_encoding": "RoPE", "norm_position": "Pre-Norm"}
    with pytest.warns(UserWarning, match="sliding_window=128"):
        load_ckpt_pt(write(tmp_path, checkpoint(**spelled, sliding_window=128)))


@pytest.mark.parametrize("key", ["n_head", "rope_theta", "norm_eps", "block_size"])
def test_a_setting_that_only_model_args_knows_must_be_there(tmp_path, key):
    with pytest.raises(ValueError, match=f"model_args lacks {key}"):
        load_ckpt_pt(write(tmp_path, checkpoint(**{key: None})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("n_head", value) for value in (float("inf"), float("nan"), "six", -6, True, torch.ones(2))),
        *(("block_size", value) for value in (10**18, 0, [4096], float("inf"))),
        *(("norm_eps", value) for value in (float("nan"), -1e-5, "x")),
        *(("rope_theta", value) for value in (-1, 0, float("inf"), {})),
    ],
)
def test_a_setting_that_is_no_number_of_its_kind_is_refused_by_name(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"model_args has {key}=.*expected (a number above 0, at most|one)"):
        load_ckpt_pt(write(tmp_path, checkpoint(**{key: value})))


HOSTILE = {  # in the place of blocks.0.ffn.w_gate.weight, and what is said of it
    "expanded": (torch.ones(1, 1).expand(FF, DIM), "claims 480 elements, of which the file holds fewer"),
    "meta": (torch.empty(FF, DIM, device="meta"), "is on the device meta, so the file may hold no values"),
    "sparse": (torch.eye(FF, DIM).to_sparse(), "is sparse, quantized or nested"),
    "complex": (torch.ones(FF, DIM, dtype=torch.complex64), "is of type torch.complex64; expected floating-point"),
    "integers": (torch.ones(FF, DIM, dtype=torch.int8), "is of type torch.int8; expected floating-point"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tensor_without_a_plain_number_for_each_element_is_refused(tmp_path, name):
    content = checkpoint()
    content["model"]["blocks.0.ffn.w_gate.weight"], message = HOSTILE[name]
    with pytest.raises(ValueError, match=f"blocks.0.ffn.w_gate.weight {message}"):
        load_ckpt_pt(write(tmp_path, content))


def nested(depth: int) -> list:
    """Return a list that holds itself twice, which holds itself twice, and so on: as a text it would fill memory."""
    values = ["a"]
    for _ in range(depth):
        values = [values, values]
    return values


@pytest.mark.parametrize("key", ["normalization", "unknown", "\x1b[2J"])
def test_a_setting_that_is_a_list_of_lists_is_refused_without_writing_it_out(tmp_path, key):
    with pytest.raises(ValueError, match=r"model_args has .*=\[\[\[.*expected one text or number") as error:
        load_ckpt_pt(write(tmp_path, checkpoint(**{key: nested(45)})))
    assert len(str(error.value)) < 600


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """Write a file's zip archive anew, as `change(name, bytes)` gives its records; return its path."""
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(path.with_name("other.pt"), "w", compression) as other:
        for name in whole.namelist():
            other.writestr(name, change(name, whole.read(name)))
    return path.with_name("other.pt")


def flipped(path):
    """Change one bit of a weight, and return the path."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as whole:
        content[content.index(whole.read(next(name for name in whole.namelist() if name.endswith("/data/0")))) + 40] ^= 64
    path.write_bytes(content)
    return path


def cut_record(path):
    return rewritten(path, lambda name, data: data[:8] if name.endswith("/data/0") else data)


def compressed(path):
    return rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)


DAMAGED = {
    flipped: r"data/0 in it is not what was written \(its CRC-32 differs\); copy it again",
    cut_record: "data/0 in it has 8 bytes, its tensor 3,552; copy it again",
    compressed: "was zipped anew with compression .*copy the file again",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_weights_that_are_not_those_that_were_written_are_refused(tmp_path, damage):
    """torch.load gives other numbers for each of them, without a word."""
    path = write(tmp_path, checkpoint())
    assert load_ckpt_pt(rewritten(path, lambda name, data: data)).config.vocab_size == VOCAB
    with pytest.raises(ValueError, match=DAMAGED[damage]):
        load_ckpt_pt(damage(path))


def test_a_file_without_checksums_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path, checkpoint())
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_ckpt_pt(path).config.vocab_size == VOCAB


def test_a_tensor_with_attributes_that_hide_its_methods_is_refused(tmp_path):
    for name in ("dim", "numel", "to", "is_floating_point", "element_size", "data_ptr"):
        content = checkpoint()
        setattr(content["model"]["token_embeddings.weight"], name, 5)
        with pytest.raises(ValueError, match=f"token_embeddings.weight carries attributes of its own .'{name}'"):
            load_ckpt_pt(write(tmp_path, content))


def test_float64_becomes_float32_and_float8_is_refused(tmp_path):
    content = checkpoint()
    expected = logits(load_ckpt_pt(write(tmp_path, content)))
    content["model"] = {name: tensor.double() for name, tensor in content["model"].items()}
    with pytest.warns(UserWarning, match="float64, and are rounded to float32"):
        model = load_ckpt_pt(write(tmp_path, content), None)
    assert model.dtype == torch.float32 and torch.equal(logits(model), expected)
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"lm_head.weight is of type torch.float8_e4m3fn; expected floating-point numbers of float32, "):
        load_ckpt_pt(write(tmp_path, content))


@pytest.mark.parametrize("number", ["99999999", "2" * 5000, "3"])
def test_layers_that_are_not_there_are_not_sought(tmp_path, number):
    content = checkpoint()
    content["model"][f"blocks.{number}.norm1.weight"] = torch.ones(DIM)
    with pytest.raises(ValueError, match="its 3 layers are not numbered from 0 on"):
        load_ckpt_pt(write(tmp_path, content))


def test_keys_that_are_no_texts_are_refused(tmp_path):
    for part in ("model", "model_args"):
        content = checkpoint()
        content[part][5] = torch.ones(1)
        with pytest.raises(ValueError, match="expected only tensors in its state dict|keys that are no texts"):
            load_ckpt_pt(write(tmp_path, content))


def test_wrong_tensors_are_all_named(tmp_path):
    content = checkpoint()
    del content["model"]["blocks.1.norm2.weight"]
    content["model"]["blocks.0.attn.q_norm.weight"] = torch.ones(DIM)
    content["model"]["blocks.1.ffn.w_out.weight"] = torch.ones(FF, DIM)
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.norm2.*unknown: .*q_norm.*w_out\.weight is \(20, 24\), expected \(24, 20\)"):
        load_ckpt_pt(write(tmp_path, content))


@pytest.mark.parametrize("n_head", [5, 24])
def test_heads_that_do_not_divide_are_refused(tmp_path, n_head):
    with pytest.raises(ValueError, match=f"n_head={n_head} does not split n_embd=24"):
        load_ckpt_pt(write(tmp_path, checkpoint(n_head=n_head)))


def test_key_value_rows_must_be_whole_heads(tmp_path):
    content = checkpoint(kv_heads=2)
    content["model"]["blocks.0.attn.c_kv.weight"] = torch.ones(10, DIM)
    with pytest.raises(ValueError, match=r"c_kv\.weight has 10 rows"):
        load_ckpt_pt(write(tmp_path, content))


def small(**changes):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(**sizes, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"head_dim": 8}, "head_dim=8")),
        *(({"hidden_act": "gelu"}, "hidden_act=gelu"),),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=linear"),
    ],
)
def test_what_the_format_cannot_express_is_not_written(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        save_ckpt_pt(LlamaForCausalLM(small(**changes)), tmp_path / "ckpt.pt")
    assert not os.listdir(tmp_path)


def test_other_architectures_and_absent_weights_are_not_written(tmp_path):
    qwen = Qwen3Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="not qwen3"):
        save_ckpt_pt(Qwen3ForCausalLM(qwen), tmp_path / "ckpt.pt")
    with torch.device("meta"):
        absent = LlamaForCausalLM(small())
    with pytest.raises(ValueError, match="not whole"):
        save_ckpt_pt(absent, tmp_path / "ckpt.pt")


def test_names_of_ckpt_files():
    assert is_ckpt_pt("runs/ckpt.pt") and is_ckpt_pt("a.pth") and not is_ckpt_pt("runs/final") and not is_ckpt_pt("a.ptx")
