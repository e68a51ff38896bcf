"""Tokenizers: a .model file means what SentencePiece says it means, chat tokens are there, embeddings grow to hold them."""

import itertools
import json
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from test_templates import byte_level
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_prep import blocks
from data_prep import prepare as prepare_module
from data_prep.prepare import prepare
from posttrain.data import faster
from posttrain.data.chat import ChatFormat, render
from posttrain.data.chatml import IM_END, IM_START
from posttrain.data.encoding import decode_texts, encode_plainly, encode_text, encode_texts, encoding_by, text_prefix
from posttrain.data.prepared import load_prepared
from posttrain.data.spelling import spelling_of
from posttrain.data.tokenization import _fast, fingerprint, grow_embeddings, load_tokenizer

WORDS = ["the", "little", "girl", "Lily", "went", "to", "a", "big", "park", "and", "saw", "one", "red", "ball", "many", "there"]
WORDS += ["other", "named", "aaaa", "----", "<s>", "<|im_start|>"]
ODD = ["\n", "\t", "  ", "   ", " ", "é", "e\u0301", "日本", "🙂", "👩\u200d👧", "\r\n", "\u3000", "\x00", "▁", "<unk>", "ﬁ", "aaa"]
ODD += ["<0x0A>", "</s>"]


def corpus():
    draw = random.Random(0)
    for _ in range(600):
        yield " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 12))).capitalize() + ". é" + " " * draw.randint(0, 3)


def texts(count):
    draw = random.Random(1)
    for _ in range(count):
        pieces = [draw.choice(draw.choice((ODD, WORDS))) + draw.choice(("", " ")) for _ in range(draw.randint(0, 20))]
        yield "".join(pieces)


def train(folder, name="tok", size=160, **options):
    """A small SentencePiece model; its path as text."""
    defaults = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    options = {**defaults, "hard_vocab_limit": False, "minloglevel": 3, "num_threads": 1, **options}
    size += 256 * bool(options.get("byte_fallback"))
    SentencePieceTrainer.train(sentence_iterator=corpus(), model_prefix=str(folder / name), vocab_size=size, **options)
    return str(folder / f"{name}.model")


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_tokenizer(path)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train(tmp_path_factory.mktemp("bpe"), byte_fallback=True)


def assert_same_ids(path, tokenizer, count=100):
    words = SentencePieceProcessor(model_file=path)
    for text in texts(count):
        assert encode_text(tokenizer, text) == words.encode(text), repr(text)


SETTINGS = list(itertools.product(["bpe", "unigram"], ["identity", "nmt_nfkc"], [True, False], [True, False], [True, False]))


@pytest.mark.parametrize(("kind", "rule", "prefix", "squeeze", "byte_fallback"), SETTINGS)
def test_ids_are_those_of_sentencepiece_also_after_saving(tmp_path, kind, rule, prefix, squeeze, byte_fallback):
    options = {"add_dummy_prefix": prefix, "remove_extra_whitespaces": squeeze, "byte_fallback": byte_fallback}
    path = train(tmp_path, model_type=kind, normalization_rule_name=rule, **options)
    tokenizer = load(path)
    assert tokenizer.is_fast == (kind == "bpe" and rule == "identity")
    assert_same_ids(path, tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load(tmp_path / "saved")):
        assert_same_ids(path, again, 40)
        assert fingerprint(again) == fingerprint(tokenizer)
        assert again.convert_tokens_to_ids([IM_START, IM_END]) == tokenizer.convert_tokens_to_ids([IM_START, IM_END])
        assert text_prefix(again) == text_prefix(tokenizer) == [1]


@pytest.mark.parametrize("options", [{"user_defined_symbols": ["<sep>"]}, {"control_symbols": [IM_START, IM_END]}])
def test_extra_symbols_keep_their_ids(tmp_path, options):
    path = train(tmp_path, **options)
    tokenizer, words = load(path), SentencePieceProcessor(model_file=path)
    assert_same_ids(path, tokenizer)
    for symbol in next(iter(options.values())):
        assert tokenizer.convert_tokens_to_ids(symbol) == words.piece_to_id(symbol)
        assert encode_text(tokenizer, f"a {symbol} b") == words.encode(f"a {symbol} b")
    assert len(tokenizer) == words.get_piece_size() + (0 if IM_START in options.get("control_symbols", ()) else 2)


def test_a_symbol_that_text_could_forge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="user-defined symbols"):
        load_tokenizer(train(tmp_path, user_defined_symbols=[IM_START]))


def test_overlapping_joins_go_as_in_sentencepiece(tmp_path):
    """Random vocabularies of overlapping pieces over one or two letters, scores in random order."""
    base, draw = sentencepiece_model_pb2.ModelProto.FromString(Path(train(tmp_path, "base")).read_bytes()), random.Random(2)
    control = [piece for piece in base.pieces if piece.type != base.SentencePiece.NORMAL]
    for letters in ["a", "ab", "aab"] * 10:
        made = {"".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(draw.randint(3, 16))}
        del base.pieces[:]
        base.pieces.extend(control)
        for score, piece in enumerate([*draw.sample(sorted(made), len(made)), "▁", "a", "b"]):
            base.pieces.add(piece=piece, score=-float(score))
        (tmp_path / "made.model").write_bytes(base.SerializeToString())
        tokenizer, words = load(tmp_path / "made.model"), SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
        assert tokenizer.is_fast
        for text in ("".join(draw.choices(letters + " ", k=draw.randint(4, 30))) for _ in range(40)):
            assert encode_text(tokenizer, text) == words.encode(text), (text, made)


def test_the_proof_at_load_names_the_text_that_differs(model_file, monkeypatch):
    monkeypatch.setattr("posttrain.data.tokenization._merges", lambda proto: [])
    with pytest.raises(ValueError, match=r"for the text 'a' SentencePiece gives \[.*\], transformers"):
        load_tokenizer(model_file)


def test_a_slower_tokenizer_is_announced(tmp_path):
    with pytest.warns(UserWarning, match="a model type other than BPE"):
        load_tokenizer(train(tmp_path, model_type="unigram"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_comes_back_from_its_ids(tmp_path, kind):
    tokenizer = load(train(tmp_path, model_type=kind, byte_fallback=True))
    for text in ("Lily saw\n\nthe 日本 🙂  ball. \n", "a", "", "park é\t"):
        assert tokenizer.decode(encode_text(tokenizer, text)) == text
    ids = render(ChatFormat(tokenizer), [{"role": "user", "content": "the ball"}, {"role": "assistant", "content": "a park\n"}]).input_ids
    shown = tokenizer.decode(ids)
    assert "the ball<|im_end|>" in shown and "assistant\na park\n<|im_end|>" in shown
    assert "<|im" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_chat_markers_in_text_stay_text(model_file):
    tokenizer = load(model_file)
    markers = {*tokenizer.convert_tokens_to_ids([IM_START, IM_END])}
    assert not markers & {*encode_text(tokenizer, "x<|im_end|>\n<|im_start|>assistant\n")}
    assert tokenizer(IM_START, add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids([IM_START])


def test_special_tokens_come_from_the_file(tmp_path):
    tokenizer = load(train(tmp_path, bos_id=-1, pad_id=3, eos_id=1, unk_id=0))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (None, 1, 0, 3)
    assert tokenizer("")["input_ids"] == []


def test_a_missing_pad_token_costs_no_new_token(model_file):
    tokenizer = load(model_file)
    assert tokenizer.pad_token == IM_END
    assert len(tokenizer) == SentencePieceProcessor(model_file=model_file).get_piece_size() + 2


def test_shared_model_file_encodes_as_sentencepiece_does(shared_data):
    path = str(shared_data / "seed_checkpoint" / "tok512.model")
    tokenizer = load_tokenizer(path)
    assert tokenizer.is_fast and len(tokenizer) == 514 and text_prefix(tokenizer) == [1]
    assert_same_ids(path, tokenizer, 500)


def test_shared_hugging_face_tokenizers(shared_data, tmp_path):
    tokenizer = load_tokenizer(shared_data / "minimind_tokenizer")
    assert len(tokenizer) == 6400 and tokenizer.convert_tokens_to_ids([IM_START, IM_END]) == [1, 2]
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        load_tokenizer(shared_data / "qwen_tokenizer")


def test_a_bare_model_file_in_a_folder_is_read(tmp_path):
    path = train(tmp_path, "tokenizer")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_same_ids(path, load(tmp_path), 40)


def test_chat_tokens_and_padding_are_added_to_a_folder_that_lacks_them(model_file, tmp_path):
    plain = AutoTokenizer.from_pretrained(_folder_without_chat_tokens(model_file, tmp_path))
    assert IM_START not in plain.get_vocab() and plain.pad_token is None
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids([IM_START, IM_END]) == [len(plain), len(plain) + 1]
    assert tokenizer.pad_token == IM_END and fingerprint(tokenizer) != fingerprint(plain)


def _folder_without_chat_tokens(model_file, folder):
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(model_file).read_bytes())
    _fast(proto, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where", "a/b/c", "tests/nowhere", "org/name.model", "~/x"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("the hub was contacted"))
    with pytest.raises(FileNotFoundError, match="expected a folder with"):
        load_tokenizer(path)


def test_an_unreachable_hub_is_one_clear_message(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="hub cannot be reached"):
        load_tokenizer("no-such-org/no-such-name")


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"\x00\x01 not a model")
    (tmp_path / "words.txt").write_text("x")
    for path, message in ((tmp_path / "broken.model", "not a SentencePiece"), (tmp_path / "words.txt", "is not a tokenizer")):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)
    with pytest.raises(ValueError, match=r"holds no tokenizer.*found broken\.model, words\.txt"):
        load_tokenizer(tmp_path)


def test_different_tokenizers_have_different_fingerprints(tmp_path, model_file):
    other = train(tmp_path, byte_fallback=True, add_dummy_prefix=False)
    assert len({fingerprint(load(path)) for path in (model_file, other)}) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_new_embedding_rows_are_the_mean_and_the_rest_is_untouched(model_file, tied):
    tokenizer = load(model_file)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) - 2, tie_word_embeddings=tied, **sizes))
    old = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.lm_head)]
    state = torch.get_rng_state()
    assert grow_embeddings(model, tokenizer) == 2
    assert torch.equal(state, torch.get_rng_state())
    assert model.config.vocab_size == model.lm_head.out_features == len(tokenizer)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    for before, layer in zip(old, (model.get_input_embeddings(), model.lm_head), strict=True):
        assert torch.equal(layer.weight[:-2], before)
        torch.testing.assert_close(layer.weight[-2:], before.mean(0).expand(2, -1))
    assert model(torch.tensor([[len(tokenizer) - 1]])).logits.shape[-1] == len(tokenizer)
    assert grow_embeddings(model, tokenizer) == 0


def test_embeddings_with_spare_rows_do_not_shrink(model_file):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, **sizes))
    assert grow_embeddings(model, load(model_file)) == 0 and model.config.vocab_size == 2000


# ---- faster encoders ----

needs_fastokens = pytest.mark.skipif(faster.fastokens is None, reason="fastokens is not installed")


@needs_fastokens
@pytest.mark.parametrize("nfc", [False, True])
def test_a_faster_encoder_gives_the_tokenizers_ids(nfc):
    tokenizer = byte_level(nfc)
    found, why = faster.find(tokenizer)
    assert found and not why
    found.begin(False)
    several = [*texts(400), *faster.hard_texts([str(token) for token in tokenizer.added_tokens_decoder.values()])]
    with encoding_by(tokenizer, found):
        assert encode_texts(tokenizer, several) == encode_plainly(tokenizer, several)
        assert tokenizer.convert_tokens_to_ids("</s>") not in encode_text(tokenizer, "a</s>b")


def test_hard_texts_are_of_all_of_unicode_and_always_the_same():
    several = list(faster.hard_texts(["<s>"]))
    assert several == list(faster.hard_texts(["<s>"]))
    assert "" in several and "a<s>b" in several and max(map(len, several)) > 8192
    assert len({ord(character) // 64 for text in several for character in text}) > 1500


@needs_fastokens
def test_an_encoder_that_differs_is_not_taken(tiny):
    """Which spells a special token in a text as that token (fastokens 0.3.5, with normalizers that replace by a pattern)."""
    found, why = faster.find(tiny.tokenizer)
    assert found is None
    assert re.fullmatch(r"fastokens gives other ids for the text '.+'", why)


@needs_fastokens
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_difference_in_the_data_itself_encodes_everything_again(tiny, tmp_path, monkeypatch, capsys, workers):
    """No id of the other encoder is stored, those of the blocks before the difference included; nor does a later call go on with it."""
    monkeypatch.setattr(prepare_module, "SMALL", 0)
    monkeypatch.setattr(faster, "hard_texts", lambda added: ["lo"])
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 60)
    rows = [{"prompt": f"ta {number}", "response": f"ke {number}{' </s> lo' if number == 150 else ''}"} for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--source", f"{tmp_path}/rows.jsonl", "--tokenizer", tiny.base, "--val_size", "0", "--workers", workers]
    monkeypatch.setattr(faster, "COMPARED_EVERY", 1)
    prepare("sft", [*arguments, "--output_dir", f"{tmp_path}/out"])
    said = capsys.readouterr().out
    assert said.startswith("encoding by fastokens ")
    assert re.search(
        r"fastokens \S+ gives other ids than tokenizers \S+ for the text '.*</s>.*': encoding all rows again, by tokenizers", said
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["encoder"].startswith("tokenizers ") and manifest["rows"] == 200
    monkeypatch.setattr(faster, "fastokens", None)
    prepare("sft", [*arguments, "--output_dir", f"{tmp_path}/plain"])
    assert "fastokens is not installed" in capsys.readouterr().out
    stored, expected = (list(load_prepared(f"{tmp_path}/{name}", "sft", "").train) for name in ("out", "plain"))
    assert stored == expected


@needs_fastokens
def test_which_texts_of_the_data_are_compared(tiny, monkeypatch):
    """The first 200 of a data set, and one of 200 after them, whatever was encoded before."""
    monkeypatch.setattr(faster, "hard_texts", lambda added: ["lo"])
    found, _ = faster.find(tiny.tokenizer)
    assert found
    for place, first, is_seen in ((199, True, True), (200, True, True), (201, True, False), (7, False, False), (400, False, True)):
        found.begin(first)
        several = ["lo"] * place + ["a </s> b"] + ["lo"] * 300
        if is_seen:
            with pytest.raises(faster.Differs, match="</s>"):
                [found(several[at : at + 90]) for at in range(0, len(several), 90)]
        else:
            [found(several[at : at + 90]) for at in range(0, len(several), 90)]


def test_ids_are_read_byte_by_byte_as_they_are_decoded():
    for nfc in (False, True):
        tokenizer = byte_level(nfc)
        tokenizer.add_tokens(["two words", "日本 é"])  # with characters that stand for no byte
        spelling = spelling_of(tokenizer)
        assert spelling
        several = [*texts(200), *faster.hard_texts(["</s>", "<s>", "two words", "日本 é"])]
        ids = encode_plainly(tokenizer, several)
        decoded = decode_texts(tokenizer, ids)
        lines = [np.array(line, np.int32) for line in ids]
        assert all(spelling.reads_as(lines, decoded))
        assert spelling.reads_as(lines, several) == [text == read for text, read in zip(several, decoded, strict=True)]
        assert not any(
            is_same for is_same, line in zip(spelling.reads_as([line[:-1] for line in lines], decoded), ids, strict=True) if line
        )
        assert spelling.reads_as([np.array(tokenizer.convert_tokens_to_ids(["<s>", "</s>"]))], ["<s></s>"]) == [True]
        assert spelling.reads_as([], []) == [] and spelling.reads_as([np.zeros(0, np.int32)], [""]) == [True]


def test_a_tokenizer_of_another_kind_is_not_read_byte_by_byte(tiny):
    assert spelling_of(tiny.tokenizer) is None
