"""Real datasets through real tokenizers: every row is read, proven, and has the ids that transformers' own template code gives."""

import itertools
import json

import pytest

from data_prep.folders import find_files
from data_prep.formats.rows import file_rows
from data_prep.prepare import prepare
from data_prep.preview import parse as parse_preview
from data_prep.shapes.conversations import conversations
from data_prep.show import show
from posttrain.data.chat import ChatFormat, render
from posttrain.data.parts import Refused
from posttrain.data.tokenization import load_tokenizer

SFT = (
    *("rasbt_instruction_and_preference/instruction-data.json", "llamafactory_demo/alpaca_en_demo.json", "llamafactory_demo/identity.json"),
    *("gpteacher_roleplay", "dolly_hhrlhf_small", "sharegpt_format_identity", "gsm8k", "llamafactory_demo/glaive_toolcall_en_demo.json"),
)
DPO = (
    *("rasbt_instruction_and_preference/instruction-data-with-preference.json", "llamafactory_demo/dpo_en_demo.json"),
    *("ultrafeedback_1200", "orca_dpo_pairs_284", "hh_rlhf_harmless_test"),
)
TOKENIZERS = ("minimind", "qwen3", "tok512")
MOST = 1000  # rows that are compared with apply_chat_template, which is slow
TOOLS = "glaive"  # needs a template that knows tool calls


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer_path(request, shared_data, tmp_path_factory):
    if request.param == "minimind":
        return shared_data / "minimind_tokenizer"
    if request.param == "tok512":
        return shared_data / "seed_checkpoint" / "tok512.model"
    folder = tmp_path_factory.mktemp("qwen3")
    for name, file in (
        ("vocab.json", "vocab.json"),
        ("merges.txt", "merges.txt"),
        ("tokenizer_config.json", "qwen3_tokenizer_config.json"),
    ):
        (folder / name).write_bytes((shared_data / "qwen_tokenizer" / file).read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "source"), [*(("sft", source) for source in SFT), *(("dpo", source) for source in DPO)])
def test_every_row_is_proven(shared_data, tmp_path, tokenizer_path, kind, source):
    template = "tokenizer" if TOOLS in source else "chatml"
    if template == "tokenizer" and tokenizer_path.suffix == ".model":
        pytest.skip("a bare SentencePiece model has no template for tool calls")
    arguments = ["--source", str(shared_data / source), "--tokenizer", str(tokenizer_path), "--template", template, "--max_length", "8192"]
    prepare(kind, [*arguments, "--output_dir", f"{tmp_path}/out"])
    show(parse_preview([f"{tmp_path}/out", "--check"]))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    unusable = sum(entry["rows"] for entry in manifest["ledger"].values() if entry["unusable"])
    assert unusable < 0.05 * manifest["rows"]
    assert not any("read as" in cause or "proven" in cause for cause in manifest["ledger"])


@pytest.mark.slow
@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
@pytest.mark.parametrize("source", SFT)
def test_ids_are_those_of_apply_chat_template(shared_data, tokenizer_path, source, template):
    """Except where white space at an answer's or question's edge would merge with the template's own."""
    if (template == "tokenizer" and tokenizer_path.suffix == ".model") or (template == "chatml" and TOOLS in source):
        pytest.skip("no such template")
    tokenizer = load_tokenizer(tokenizer_path, template)
    chat = ChatFormat(tokenizer, template)
    tokenizer.chat_template = chat.jinja
    compared = edges = 0
    rows = (row for file in find_files(str(shared_data / source))[0] for row in file_rows(file))
    for item in itertools.islice(conversations("sft", rows), MOST):
        if isinstance(item, Refused):
            continue
        compared += 1
        if render(chat, item.messages, item.tools).input_ids != tokenizer.apply_chat_template(
            item.messages, tools=item.tools, return_dict=False
        ):
            edges += 1
            contents = [message["content"] for message in item.messages]
            assert any(content != content.strip() for content in contents), contents
    print(f"{source}: {compared} rows, {edges} with white space at an edge")
    assert compared > 90
    assert edges <= 0.15 * compared
