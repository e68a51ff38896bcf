"""Folders of strangers, or of a bad disk, damaged at random: what opens them goes on rightly, or names the file in one bounded sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzed import bounded, damage, damage_to_bytes, damaged_bytes, ended, files_of, process_group, put, tries
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import tokenization
from posttrain.data.chat import ChatFormat
from posttrain.model import assistant
from posttrain.model.forms import tokenizer_beside
from posttrain.model.policy import load_policy
from posttrain.recipes.keys import SFTRecipe
from posttrain.recipes.reading import KINDS, build_recipe
from posttrain.training import reference
from posttrain.training.build import read_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A process group of one, and no words of libraries."""
    assistant.quiet_libraries()
    with process_group(tmp_path_factory.mktemp("fuzz")):
        yield


# ---- models ----

PLAIN = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A model's folder and its files, the weights in shards beside an index."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(tiny.base, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny.base).save_pretrained(folder, max_shard_size="40KB")
    (folder / "chat_template.jinja").write_text(tiny.chat.jinja)
    special = {"eos_token": {"content": "<|im_end|>", "special": True}, "additional_special_tokens": ["<|im_start|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def begin_training(folder: Path) -> None:
    """Do what training does first with a model's folder, and see that it can be trained on packed rows."""
    place = tokenizer_beside(str(folder)) or "nowhere"
    tokenizer = tokenization.load_tokenizer(place)
    tokenization.fingerprint(tokenizer)
    ChatFormat(tokenizer, "chatml")
    values = {"checkpoint_path": str(folder), "sft_data_dir": "x", "out_dir": "x", "global_batch_size": 1, "dtype": "float32"}
    load_policy(build_recipe(SFTRecipe, values, {}), tokenizer, torch.device("cpu"), sharded=False)


def serve(folder: Path) -> None:
    """Do what serving does first with a model's folder, and see that it can answer."""
    one = assistant.load(str(folder))
    ids = one.tokenizer("pa ke", return_tensors="pt").input_ids % one.model.config.vocab_size
    if ids.numel():
        with torch.inference_mode():
            one.model(ids.long())


def first_use(model, first, name: str, *how) -> None:
    folder, files = model
    try:
        put(folder, files, name, *how)
        ended(lambda: first(folder), folder, name)
    finally:
        (folder / name).write_bytes(files[name])


@given(st.data())
@tries(500)
def test_a_damaged_model_is_used_or_named(model, data):
    first_use(model, data.draw(st.sampled_from([begin_training, serve])), *data.draw(damage(model[1])))


EMBEDDING = ("weight_map", "model.embed_tokens.weight")


@pytest.mark.parametrize("first", [begin_training, serve])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("model.safetensors.index.json", (EMBEDDING, value)) for value in ("/etc/passwd", "../x", "", [1] * 10_000)),
        ("tokenizer_config.json", (("model_max_length",), "")),
        ("tokenizer.json", (("model", "vocab", "<0x17>"), 10**9)),
        ("tokenizer.json", (("model", "unk_token"), None)),
        ("tokenizer_config.json", (("unk_token",), "x")),
    ],
)
def test_damage_that_was_found_once_is_named(model, first, name, how):
    first_use(model, first, name, *how)


# ---- prepared data ----


@pytest.fixture(scope="module", params=["sft", "dpo"])
def prepared(tiny, request, tmp_path_factory):
    """Prepared data: its folder, its files, and its recipe."""
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    shutil.copytree(tiny.folder / request.param, folder)
    model, data = ("checkpoint_path", "sft_data_dir") if request.param == "sft" else ("sft_checkpoint_path", "dpo_data_dir")
    values = {model: tiny.base, data: str(folder), "tokenizer": f"{folder}/tokenizer", "out_dir": "unused", "global_batch_size": 4}
    return folder, files_of(folder, ".png"), build_recipe(KINDS[request.param][0], values, {})


def train_on(recipe):
    """Read the inputs of a run, as it does, and return what decides its result."""
    data, chat = read_inputs(recipe)[:2]
    batches = [split.micro_batch(range(min(9, len(split)))) for split in (data.train, data.validation)]
    tokens = [batch.input_ids.tolist() + batch.targets.tolist() for batch in batches]
    return data.fingerprint, data.system_prompt, tokens, data.train.lengths.tolist(), data.train.trained.tolist(), chat.hash


@given(st.data())
@tries(250)
def test_damaged_data_is_the_same_or_named(prepared, data):
    folder, files, recipe = prepared
    whole = train_on(recipe)
    name, *how = data.draw(damage(files))
    try:
        put(folder, files, name, *how)
        found = ended(lambda: train_on(recipe), folder)
        assert found in (None, whole), f"{name} is damaged, and nobody sees it"
    finally:
        (folder / name).write_bytes(files[name])


def test_damaged_log_probs_of_the_reference_are_computed_anew(tmp_path):
    """Never are others taken, and no damage stops the run."""
    sums, path = np.random.default_rng(0).normal(size=(7, 2, 2)), tmp_path / "train.npz"
    reference._write(path, sums)
    content = path.read_bytes()

    def load(how: tuple) -> None:
        path.write_bytes(damaged_bytes(content, how))
        with bounded():
            found = reference._load(path, 7)
        assert found is None or (found == sums).all()

    for place in range(len(content)):
        for bit in (0, 3, 7):
            load(("flip", place, bit))
    tries(200)(given(damage_to_bytes(len(content)))(load))()
