"""Model and tokenizer folders of others: each is trained as it is, or refused in one sentence; nothing is lost or run without a word."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bases
import httpx
import pytest
import safetensors.torch
import torch
import transformers
from conftest import last_of_each, python
from fuzzed import process_group
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from test_runs import sft_arguments

from posttrain.data.tokenization import fingerprint, load_tokenizer, open_tokenizer
from posttrain.model import assistant, loading, policy
from posttrain.model.forms import find_model, tokenizer_beside
from posttrain.model.loading import load_model, read_config
from posttrain.model.sample_rows import packed_rows, plain_logps, sample_rows
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import build_recipe

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3441185608\n"
NORM = "model.norm.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def configure(folder: Path, file: str = "config.json", **values) -> None:
    """Set keys of a JSON file, which need not be there."""
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def state(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def put(folder: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors") -> None:
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})


def with_tensors(**more):
    """Return what adds tensors to a folder's weights, or replaces them; in a name `__` stands for a dot."""
    return lambda folder: put(folder, state(folder) | {name.replace("__", "."): tensor for name, tensor in more.items()})


def config_with(**values):
    return lambda folder: configure(folder, **values)


def renamed(change):
    """Return what gives the tensors of a folder's weights other names."""
    return lambda folder: put(folder, {change(name): tensor for name, tensor in state(folder).items()})


def written(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def without(name: str):
    return lambda folder: (folder / name).unlink()


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:5000])


def flipped(name: str):
    """Return what changes a bit in the middle of a file."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 64
        (folder / name).write_bytes(content)

    return change


def endless_header(folder: Path) -> None:
    """Make a sparse file of 21 GB whose first 8 bytes tell of a header of 20 GB."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write((20 * 2**30).to_bytes(8, "little"))
        file.truncate(21 * 2**30)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def shards(folder: Path, index: dict) -> None:
    """Split the weights in two files, with an index whose keys are `index` and the map."""
    tensors = state(folder)
    where = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(tensors)}
    for file in set(where.values()):
        put(folder, {name: tensor for name, tensor in tensors.items() if where[name] == file}, file)
    (folder / "model.safetensors").unlink()
    configure(folder, "model.safetensors.index.json", **index, weight_map=where)


def adapter(folder: Path) -> None:
    configure(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="org/the-base")
    put(folder, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}, "adapter_model.safetensors")


def alone(make):
    """Return what makes a folder with nothing else in it."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        make(folder)

    return change


ZERO, BYTES, FP8 = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(32, 32).to(torch.float8_e4m3fn)
Q_PROJ = "model__layers__0__self_attn__q_proj"
CODE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Tokenizer", None]}
REFUSED = {
    # forms that are not taken
    "adapter_alone": (alone(adapter), "is a LoRA adapter of org/the-base, not a model: merge it"),
    "adapter_beside": (adapter, r"holds a LoRA adapter \(adapter_config.json\) beside a whole model"),
    "adapter_weights_beside": (both(adapter, without("adapter_config.json")), "adapter_model.safetensors.* beside a whole model"),
    "gguf_alone": (alone(written("m-Q4_K.gguf", "GGUF")), r"GGUF \(m-Q4_K.gguf\)"),
    "gguf_for_weights": (lambda f: (f / "model.safetensors").rename(f / "m.gguf"), r"GGUF weights only \(m.gguf\)"),
    "deepspeed_checkpoint": (alone(written("zero_to_fp32.py", "")), "DeepSpeed's checkpoint"),
    "makers_own_form": (alone(written("params.json", "{}")), "params.json"),
    "model_one_folder_below": (
        lambda f: shutil.move(shutil.copytree(f, f / "checkpoint-9") and f / "config.json", f / "x"),
        "checkpoint-9",
    ),
    # quantized
    "gptq": (config_with(quantization_config={"quant_method": "gptq"}), "is quantized .by gptq.*take the bfloat16 or float16 model"),
    "fp8_in_a_part": (config_with(text_config={"quantization_config": {"quant_method": "fp8"}}), "quantized .by fp8"),
    "compressed": (config_with(compression_config={"format": "int-quantized"}), "quantized .says compression_config"),
    "modelopt": (written("hf_quant_config.json", "{}"), "quantized .says hf_quant_config.json"),
    "qweight": (with_tensors(**{Q_PROJ + "__qweight": ZERO}), "quantized .its weights hold .*q_proj.qweight, F32"),
    "absmax": (with_tensors(**{Q_PROJ + "__weight__absmax": ZERO}), "quantized .its weights hold .*absmax"),
    "scales": (with_tensors(**{Q_PROJ + "__weight_scale_inv": ZERO}), "quantized .its weights hold .*weight_scale_inv"),
    "fp8_weights": (with_tensors(**{Q_PROJ + "__weight": FP8}), "quantized .its weights hold .*F8_E4M3"),
    "packed_bytes": (with_tensors(**{Q_PROJ + "__weight": BYTES}), "quantized .its weights hold .*U8"),
    # files
    "weights_pointer": (written("model.safetensors", POINTER), "model.safetensors is a git-lfs pointer.*git lfs pull"),
    "tokenizer_pointer": (written("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
    "config_pointer": (written("config.json", POINTER), "config.json is a git-lfs pointer"),
    "weights_cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "cut or damaged"),
    "weights_not_safetensors": (written("model.safetensors", "<html>" * 300), "cut or damaged, or no safetensors file"),
    "no_weights": (without("model.safetensors"), "has no weights: expected model.safetensors"),
    "index_without_metadata": (lambda f: shards(f, {}), 'index.json has no "metadata".* add "metadata": {}'),
    "shard_missing": (
        both(lambda f: shards(f, {"metadata": {}}), without("model-00002-of-00002.safetensors")),
        r"names 2 files, of which 1 are missing \(model-00002-of-00002.safetensors\)",
    ),
    "index_missing": (
        both(lambda f: shards(f, {"metadata": {}}), without("model.safetensors.index.json")),
        "holds model-00001-of-00002.safetensors, .* but no index",
    ),
    "config_cut": (written("config.json", '{"model_type": "qw'), "config.json is damaged"),
    "config_a_list": (written("config.json", "[]"), "config.json is damaged"),
    "config_of_brackets": (written("config.json", "[" * 200_000), "config.json is damaged"),
    # kinds of model
    "no_type": (config_with(model_type=None), "config.json has no model_type"),
    "unknown_type": (config_with(model_type="qwen9"), f"'qwen9', which transformers {transformers.__version__} does not know"),
    "vision": (config_with(mm_vision_tower="clip"), "is a vision-language model in its maker's own form"),
    "encoder_decoder": (config_with(is_encoder_decoder=True), "is an encoder-decoder model"),
    "classifier": (config_with(architectures=["Qwen3ForSequenceClassification"]), "is a model for another task"),
    "not_causal": (config_with(model_type="vit"), "type 'vit', which is not a causal language model"),
    "compressed_without_a_word": (config_with(quantization_config={}), "quantized .says quantization_config"),
    "packed_bytes_in_a_pickle": (
        both(
            with_tensors(**{Q_PROJ + "__weight": BYTES}),
            lambda f: torch.save(state(f), f / "pytorch_model.bin"),
            without("model.safetensors"),
        ),
        "quantized .its weights hold .*uint8",
    ),
    "pickle_cut": (
        both(lambda f: torch.save(state(f), f / "pytorch_model.bin"), without("model.safetensors"), cut("pytorch_model.bin")),
        "pytorch_model.bin is cut or damaged: copy it again",
    ),
    "pickle_flipped": (
        both(lambda f: torch.save(state(f), f / "pytorch_model.bin"), without("model.safetensors"), flipped("pytorch_model.bin")),
        r"pytorch_model.bin is damaged: pytorch_model/data/\d+ in it is not what was written .*copy it again",
    ),
    "pickle_with_a_number_for_a_name": (
        both(lambda f: torch.save({**state(f), 5: ZERO}, f / "pytorch_model.bin"), without("model.safetensors")),
        "pytorch_model.bin has 5 where a tensor's name should be",
    ),
    "header_of_20_gb": (endless_header, "model.safetensors is damaged, .* claims a header of 21,474,836,480 bytes; copy it again"),
    "header_nested": (
        lambda f: (f / "model.safetensors").write_bytes((20000).to_bytes(8, "little") + b"[" * 20000),
        "model.safetensors .20,008 bytes. is cut or damaged",
    ),
    "pickle_a_page": (
        both(written("pytorch_model.bin", "<html>" * 99), without("model.safetensors")),
        "is no file of torch.save .it begins with b'<html>",
    ),
    "pickle_of_a_training": (
        both(lambda f: torch.save({"state_dict": state(f), "epoch": 3}, f / "pytorch_model.bin"), without("model.safetensors")),
        "holds something else than a model's tensors by name .its keys: 'state_dict', 'epoch'",
    ),
    "generation_config_cut": (written("generation_config.json", '{"do_sample": tr'), "generation_config.json is damaged"),
    "generation_config_a_list": (written("generation_config.json", "[]"), "generation_config.json is damaged"),
    "a_key_twice": (
        written("generation_config.json", '{"top_k": 1, "top_k": 50}'),
        "generation_config.json is damaged: top_k is set twice",
    ),
    "weights_a_folder": (
        both(without("model.safetensors"), lambda f: (f / "model.safetensors").mkdir()),
        "model.safetensors is not a file",
    ),
    "weights_a_link_to_nowhere": (
        both(without("model.safetensors"), lambda f: (f / "model.safetensors").symlink_to("gone")),
        "model.safetensors is a link that leads nowhere",
    ),
    "shard_of_another_save": (
        both(
            lambda f: shards(f, {"metadata": {}}),
            *(lambda f, file=file: put(f, safetensors.torch.load_file(f / file) | {NORM: torch.ones(32)}, file) for file in SHARDS),
        ),
        f"holds 1 tensors twice: {NORM} is in model-00002-of-00002.safetensors and in a file before it",
    ),
    # tensors that do not fit config.json
    "share_of_zero3": (
        with_tensors(**{Q_PROJ + "__weight": torch.zeros(0)}),
        r"is not whole: .*q_proj.weight has shape \[0\], as when .*ZeRO-3",
    ),
    "other_shape": (
        config_with(vocab_size=10**9),
        r"model.embed_tokens.weight is \[\d+, 32\] in the file, \[1000000000, 32\] by config.json",
    ),
    "other_shape_in_a_pickle": (
        both(lambda f: torch.save(state(f), f / "pytorch_model.bin"), without("model.safetensors"), config_with(intermediate_size=49)),
        r"proj.weight is \[.*48.*\] in the file, \[.*49.*\] by config.json",
    ),
    "more_layers_than_config": (
        config_with(num_hidden_layers=1, layer_types=None),
        r"has 11 unexpected tensors \(model.layers.1.*they would be lost",
    ),
    "fewer_layers_than_config": (config_with(num_hidden_layers=3, layer_types=None), "lacks 11 tensors .*random values"),
    "endless_layers": (config_with(num_hidden_layers=10**9, layer_types=None), "says num_hidden_layers 1000000000, the weights"),
    "bias": (with_tensors(**{Q_PROJ + "__bias": torch.ones(32)}), "has 1 unexpected tensors .*q_proj.bias.*they would be lost"),
    "value_head": (with_tensors(v_head__summary__weight=torch.ones(1, 32)), "unexpected tensors .v_head.summary.weight"),
    "other_names": (
        renamed(lambda name: f"wrapped.{name.replace('q_proj', 'query')}"),
        r"lacks 25 tensors .* random values, and has 24 unexpected tensors \(wrapped.model.embed",
    ),
    "part_of_another_model": (
        renamed(lambda name: name.replace("model.", "model.language_model.")),
        r"other names .* such as model.language_model.embed_tokens.weight for model.embed_tokens.weight.* a part of another model",
    ),
    "adapter_not_merged": (renamed(lambda name: name.replace("q_proj.w", "q_proj.base_layer.w")), "LoRA adapter is not merged.*base_layer"),
    "adapter_among_them": (
        with_tensors(**{"base_model__model__" + Q_PROJ + "__lora_A__weight": ZERO}),
        "LoRA adapter is not merged.*lora_A",
    ),
    "twice": (with_tensors(_orig_mod__model__norm__weight=torch.ones(32)), "1 tensors twice"),
    # values of config.json
    "pad": (config_with(pad_token_id=32000), "config.json has pad_token_id 32000, but vocab_size"),
    "text_for_a_number": (config_with(hidden_size="x"), "cannot be loaded: Validation error for field 'hidden_size': .*expected int"),
    "no_heads": (config_with(num_attention_heads=0), "the model at .* cannot be loaded"),
    "unknown_activation": (
        config_with(hidden_act="evil"),
        "cannot be loaded: KeyError: 'evil', which .*config.json has as hidden_act, and",
    ),
    "unknown_scaling": (
        config_with(rope_parameters={"rope_type": "ntk", "rope_theta": 1e4, "factor": 2.0}),
        "'ntk', which .* has as rope_type",
    ),
    "unknown_dtype": (config_with(torch_dtype="torch.bfloat16"), "has torch_dtype 'torch.bfloat16'; expected the name of one, such as"),
    "no_positions": (
        config_with(max_position_embeddings=1),
        "has max_position_embeddings 1, how many tokens a row may have; expected 2 or",
    ),
    "list_for_an_object": (config_with(rope_parameters=[]), "cannot be loaded"),
}


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.base, tmp_path / "model"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_trained_is_refused_in_one_sentence(folder, name):
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_model(str(folder), torch.float32, "", pytest.fail)
    said = str(error.value)
    assert str(folder) in said
    assert "\n" not in said
    assert len(said.replace(str(folder), "FOLDER")) < 500
    assert not re.search("trust_remote_code|ignore_mismatched|above|pip install", said)
    assert getattr(error.value, "errno", None) is None  # else it would not count as the user's mistake


@pytest.mark.parametrize("name", ["m.gguf", "model.safetensors", "config.json", "model.tar"])
def test_a_file_that_is_named_directly_is_refused(folder, name):
    (folder / "m.gguf").touch()
    expected = "GGUF" if name == "m.gguf" else f"is a file, not a model: name its folder, {folder}"
    if name == "model.tar":
        folder = folder.parent
        (folder / name).touch()
        expected = "is a file, not a model: expected a folder with config.json"
    with pytest.raises(ValueError, match=expected):
        find_model(str(folder / name), "")


def rotary(folder: Path) -> None:
    """Add constants that older versions saved, for each layer."""
    with_tensors(**{f"model__layers__{layer}__self_attn__rotary_emb__inv_freq": torch.ones(4) for layer in (0, 1)})(folder)


def mtp_layer(folder: Path) -> None:
    """Add a layer of DeepSeek's kind for multi-token prediction after the last one."""
    extra = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in state(folder).items() if "layers.1." in name}
    put(
        folder, state(folder) | extra | {"model.layers.2.eh_proj.weight": torch.ones(32, 64), "model.layers.2.enorm.weight": torch.ones(32)}
    )


def as_pickle(folder: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in state(folder).items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


SAME = {
    "compiled": (renamed("_orig_mod.{}".format), "24 tensors are read without a wrapper's prefix: _orig_mod.model"),
    "ddp_of_compiled": (renamed("module._orig_mod.{}".format), "module._orig_mod.model.embed_tokens.weight as model.embed"),
    "base_model_compiled": (renamed(lambda name: name.replace("model.", "model._orig_mod.", 1)), "24 tensors are read without"),
    "peft_merged": (renamed("base_model.model.{}".format), "base_model.model.model.embed_tokens.weight as model.embed"),
    "pickle_of_ddp": (as_pickle, "24 tensors are read without a wrapper's prefix: module.model"),
    "rotary_constants": (rotary, r"left out: 2 tensors \(model.layers.0.self_attn.rotary_emb.inv_freq, ...\) which are constants"),
    "causal_mask": (with_tensors(model__layers__0__attn__bias=torch.ones(1, 1, 4, 4)), "left out: 1 tensors .*attn.bias.* constants"),
    "mtp_modules": (with_tensors(mtp__layers__0__norm__weight=torch.ones(32)), "left out: 1 tensors .mtp.* multi-token prediction"),
    "mtp_layer": (mtp_layer, "left out: 13 tensors .model.layers.2.* multi-token prediction, which is not trained"),
    "kernel_of_the_hub": (config_with(attn_implementation="evil/kernel", experts_implementation="evil/kernel"), None),
    "kernel_by_another_key": (config_with(_attn_implementation={"": "evil/kernel"}), None),
    "flash_attention": (config_with(attn_implementation="flash_attention_2"), None),
    "own_code_of_a_known_type": (config_with(auto_map=CODE), "names code of its own .auto_map., which is not run"),
    "shards": (lambda f: shards(f, {"metadata": {}}), None),
    "pad_of_another_form": (config_with(pad_token_id=-1), None),
    "byte_order_mark": (lambda f: (f / "generation_config.json").write_text("\ufeff{}"), None),
}


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    with process_group(tmp_path):
        yield


@pytest.mark.parametrize("name", SAME)
def test_what_is_whole_in_another_form_is_the_same_model_and_said(tiny, folder, name):
    change, expected = SAME[name]
    change(folder)
    said = []
    model = load_model(str(folder), torch.float32, "", said.append)
    seen, right = model.state_dict(), state(Path(tiny.base))
    assert all(torch.equal(seen[key], tensor) for key, tensor in right.items())
    assert len(said) == (expected is not None)
    assert expected is None or re.search(expected, said[0])
    assert model.config._attn_implementation == "sdpa"


def test_what_was_left_out_is_told_on_the_first_screen(tiny, folder, alone):
    mtp_layer(folder)
    paths = {"checkpoint_path": str(folder), "sft_data_dir": tiny.sft, "out_dir": "run"}
    recipe = build_recipe(SFTRecipe, {**paths, "max_iters": 1, "global_batch_size": 1, "dtype": "float32"}, {})
    choices = policy.load_policy(recipe, tiny.tokenizer, torch.device("cpu"), sharded=False)[1]
    assert [re.sub(r".*\) ", "", text) for label, text in choices if label == "model"] == [
        "of multi-token prediction, which is not trained"
    ]


def test_layers_that_a_class_hides_are_seen(folder, monkeypatch):
    """DeepSeek's class makes transformers drop model.layers.61 without a word: right for an MTP layer, wrong for one more layer."""
    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*", "^extra"])
    with_tensors(extra__weight=torch.ones(2))(folder)
    mtp_layer(folder)
    said = []
    load_model(str(folder), torch.float32, "", said.append)
    assert [re.sub(r".*\) ", "", one) for one in said] == [
        "which transformers does not use",
        "of multi-token prediction, which is not trained",
    ]
    put(folder, {name: tensor for name, tensor in state(folder).items() if not re.search(r"2\.(eh_proj|enorm)", name)})
    with pytest.raises(ValueError, match=r"has 11 unexpected tensors \(model.layers.2"):
        load_model(str(folder), torch.float32, "")


def test_a_folder_of_the_hubs_cache_is_its_snapshot(tiny, tmp_path):
    cache = tmp_path / "models--org--name"
    for name in ("aaa", "bbb"):
        shutil.copytree(tiny.base, cache / "snapshots" / name)
    configure(cache / "snapshots" / "aaa", num_hidden_layers=1)
    with pytest.raises(ValueError, match="2 snapshots and no refs/main; name one: .*snapshots/aaa, .*snapshots/bbb"):
        find_model(str(cache), "")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb")
    said = []
    load_model(str(cache), torch.float32, "", said.append)
    assert said == [f"{cache} is a folder of the hub's cache: its snapshot bbb is taken"]
    assert tokenizer_beside(str(cache)) == str(cache / "snapshots" / "bbb")
    assert len(load_tokenizer(cache)) == len(load_tokenizer(tiny.base))
    assert assistant.load(str(cache), dtype=torch.float32).folder is None
    shutil.rmtree(cache / "refs")
    shutil.rmtree(cache / "snapshots" / "aaa")
    find_model(str(cache), "")
    shutil.rmtree(cache / "snapshots" / "bbb")
    with pytest.raises(FileNotFoundError, match="download did not finish"):
        find_model(str(cache), "")


BAD_TOKENIZERS = {
    "pointer": (written("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
    "sentencepiece_pointer": (
        both(without("tokenizer.json"), without("tokenizer_config.json"), written("tokenizer.model", POINTER)),
        "git-lfs",
    ),
    "cut": (written("tokenizer.json", '{"version": "1.0", "model'), "/tokenizer.json is damaged: Unterminated string"),
    "nothing_in_it": (written("tokenizer.json", "{}"), "the tokenizer in .* cannot be read: KeyError.*Copy its files again"),
    "config_cut": (written("tokenizer_config.json", "{"), "/tokenizer_config.json is damaged"),
    "config_a_list": (written("tokenizer_config.json", "[1]"), "/tokenizer_config.json is damaged: it holds a value of type list"),
    "a_folder": (
        both(without("tokenizer.json"), lambda f: (f / "tokenizer.json").mkdir()),
        "/tokenizer.json is not a file that can be read",
    ),
    "models_config": (
        config_with(hidden_size="32"),
        "/config.json cannot be read: Validation error for field 'hidden_size'.* Compare it with",
    ),
    "numbers_for_tokens": (written("tokenizer.json", '{"model": {"type": "BPE", "vocab": 5, "merges": 3}}'), "cannot be read"),
    "code": (
        both(without("tokenizer.json"), lambda f: configure(f, "tokenizer_config.json", tokenizer_class="Own", auto_map=CODE)),
        "needs code that comes with it .auto_map.*never run here",
    ),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_sentence(folder, name):
    change, message = BAD_TOKENIZERS[name]
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert "trust_remote_code" not in str(error.value)


def test_a_tokenizer_that_splits_words_at_random_is_made_to_split_them_alike(tiny, folder):
    """BPE dropout, with which some are trained: every preparation would make other rows, and training would not know the tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"splits words at random .BPE dropout 0.5 in tokenizer.json.; that is off here"):
        tokenizer = load_tokenizer(folder)
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(tiny.base))


def test_a_model_in_a_folder_named_as_a_file_of_weights_is_found(folder):
    find_model(str(folder.rename(folder.with_name("llama-v1.pt"))), "")


def test_a_config_that_asks_for_tuples_or_all_hidden_states_trains_alike(folder):
    configure(folder, return_dict=False, output_hidden_states=True, output_attentions=True)
    model = load_model(str(folder), torch.float32, "").eval()
    assert plain_logps(model, sample_rows(model.config)[0]).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "said", "noise"),
    [
        ("mixtral", "jitter_noise is off", {"router_jitter_noise": 0.1}),
        # its router draws experts at random in training, and router_jitter_noise is a threshold, in use, too
        (
            "phimoe",
            "input_jitter_noise and what PhimoeTopKRouter does in training only is off",
            {"input_jitter_noise": 0.1, "router_jitter_noise": 2.0},
        ),
    ],
)
def test_noise_of_routers_is_off_and_said(kind, said, noise, tiny, tmp_path, alone):
    """Drawn anew by each rank, it would make another curve in every layout."""
    base = bases.make(tiny, tmp_path / "base", kind, num_local_experts=4, num_experts_per_tok=2, **noise)
    paths = {"checkpoint_path": str(base), "sft_data_dir": tiny.sft, "out_dir": "run"}
    recipe = build_recipe(SFTRecipe, {**paths, "max_iters": 1, "global_batch_size": 1, "dtype": "float32"}, {})
    model, choices = policy.load_policy(recipe, tiny.tokenizer, torch.device("cpu"), sharded=False)
    assert said in dict(choices)["noise"]
    rows = sample_rows(model.model.config)
    assert torch.equal(model.train()(packed_rows(rows)), model(packed_rows(rows)))
    own = load_model(str(base), torch.float32, "")
    plain = torch.cat([plain_logps(own, row) for row in rows])
    assert torch.allclose(model(packed_rows(rows)), plain, atol=1e-5)


def test_no_embedding_of_a_model_has_a_row_that_is_not_trained(tiny, tmp_path, alone):
    """Gemma 3n and 4 have a second table, for each layer, with a padding row of its own."""
    sizes = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tiny.tokenizer)}
    base = bases.make(tiny, tmp_path / "base", "gemma4_text", **sizes, num_kv_shared_layers=0, sliding_window=512, pad_token_id=0)
    paths = {"checkpoint_path": str(base), "sft_data_dir": tiny.sft, "out_dir": "run"}
    recipe = build_recipe(SFTRecipe, {**paths, "max_iters": 1, "global_batch_size": 1, "dtype": "float32"}, {})
    model, _ = policy.load_policy(recipe, tiny.tokenizer, torch.device("cpu"), sharded=False)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    assert len(tables) > 1
    assert all(table.padding_idx is None for table in tables)


def test_no_code_of_a_folder_runs_or_is_asked_for(folder, tmp_path, monkeypatch):
    """Each loader meets a folder whose code would write a file, and an answer to the question whether it may."""
    marker, asked = tmp_path / "it_ran", []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "own.py").read_text())
    loaders = (
        lambda: load_model(str(folder), torch.float32, "", str),
        lambda: read_config(str(folder)),
        lambda: assistant.load(str(folder)),
    )
    for loader in (*loaders, lambda: load_tokenizer(folder), lambda: open_tokenizer(str(folder))):
        loader()
    configure(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map=CODE)
    load_tokenizer(folder)  # tokenizer.json says all, and config.json is of a known type
    (folder / "tokenizer.json").unlink()
    for loader in (lambda: load_tokenizer(folder), lambda: open_tokenizer(str(folder)), lambda: assistant.load(str(folder))):
        with pytest.raises(ValueError, match="the tokenizer in .* needs code"):
            loader()
    configure(folder, model_type="own", architectures=["Own"], auto_map=CODE)
    for loader in loaders:
        with pytest.raises(ValueError, match="is a model of type 'own', which only the code that comes with it can compute"):
            loader()
    assert not marker.exists()
    assert asked == []


def test_commands_refuse_before_they_import_torch(folder):
    adapter(folder)
    code = f"""import sys
from posttrain.model.forms import find_model
try:
    find_model({str(folder)!r}, "")
except ValueError as error:
    print("adapter" in str(error), "torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "True False\n", done.stderr


@pytest.mark.slow
def test_every_command_gives_the_same_answer(tiny, folder, tmp_path):
    """What config.json alone tells, as it is all that plan.py reads; and the tokenizer's for preparation."""
    configure(folder, quantization_config={"quant_method": "awq"})
    refused = f"error: {folder} is quantized (by awq"
    commands = [
        ("posttrain/sft.py", *last_of_each([*sft_arguments(tiny, tmp_path / "run"), f"--checkpoint_path={folder}"])),
        ("posttrain/dpo.py", f"--dpo_data_dir={tiny.dpo}", f"--out_dir={tmp_path}/run", f"--sft_checkpoint_path={folder}"),
        ("posttrain/plan.py", f"--checkpoint_path={folder}", f"--sft_data_dir={tiny.sft}"),
        ("posttrain/serve.py", "--checkpoint", folder),
        ("posttrain/eval_benchmarks.py", "--checkpoint", folder, "--benchmark", "arc_easy", "--output", tmp_path / "eval"),
        ("posttrain/convert.py", folder, tmp_path / "model.pt"),
    ]
    for command in commands:
        done = python(*command)
        assert refused in done.stdout, done.stdout
        assert "Traceback" not in done.stdout
        assert done.returncode == 2
    (folder / "tokenizer.json").write_text(POINTER)
    source = ("--source", f"{tiny.folder}/sft.jsonl", "--output_dir", tmp_path / "data")
    done = python("data_prep/prepare_sft.py", "--tokenizer", folder, *source)
    assert f"error: {folder}/tokenizer.json is a git-lfs pointer" in done.stdout
    assert done.returncode


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            GatedRepoError,
            r"its licence must be accepted on its page, https://hf.co/org/name; then log in: hf auth login",
        ),
        (RepositoryNotFoundError, r"the hub has no model org/name; if it is private, log in: hf auth login"),
    ],
)
def test_what_the_hub_refuses_is_said(monkeypatch, kind, said):
    def refuse(*_, **__):
        raise kind("40x Client Error.", response=httpx.Response(403, request=httpx.Request("GET", "https://hf.co")))

    monkeypatch.setattr(loading, "hf_hub_download", refuse)
    monkeypatch.setattr(loading.hub, "is_reachable", lambda: True)
    with pytest.raises(ValueError, match=said):
        read_config("org/name")
