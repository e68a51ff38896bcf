"""Any template, any text: what is trained reads as the answer that the template renders, and its end token; nothing else is trained."""

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.prepare import prepare
from data_prep.proof import APART, LACKING, LACKING_READ, encode, prove
from posttrain.data.chat import ChatFormat, encode_parts, render, render_prompt
from posttrain.data.encoded import joined, trained_spans
from posttrain.data.parts import IGNORE, Refused
from posttrain.data.tokenization import fingerprint, load_tokenizer

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% set c = m['content'] %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ c }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>"]
END = {"llama": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "thinking": "<|im_end|>", "chatml": "<|im_end|>"}
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Qwen's
TEMPLATES = {"llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "thinking": THINKING}


def byte_level(nfc: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE as Llama-3's and Qwen's: any text survives, except that Qwen's is normalised to NFC."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    text = ["user\n", "assistant\n\n", "the quick brown fox says hello world\n\n  once more. [INST] [/INST]"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


FORMATS = {}
for nfc in (False, True):
    for name, template in TEMPLATES.items():
        tokenizer = byte_level(nfc)
        tokenizer.chat_template = template
        FORMATS[name, nfc] = ChatFormat(tokenizer, "tokenizer")
    FORMATS["chatml", nfc] = ChatFormat(byte_level(nfc))

anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ue000"), min_size=1, max_size=30)
spiced = st.sampled_from([*SPECIAL, "\n", " ", "\n\n", "é", "e\u0301", "[/INST]", "assistant\n", "🙂", "<think>"])
texts = st.lists(st.one_of(anything, spiced), min_size=1, max_size=4).map("".join).filter(str.strip)


@pytest.mark.parametrize(("name", "nfc"), FORMATS)
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_trained_spans_are_exactly_the_answers(name, nfc, exchanges):
    chat = FORMATS[name, nfc]
    messages = [{"role": role, "content": text} for pair in exchanges for role, text in zip(("user", "assistant"), pair, strict=True)]
    try:
        rendered = render(chat, messages)
    except Refused:  # only a template that rewrites messages may refuse
        assert name == "thinking"
        assert any("</think>" in message["content"] for message in messages)
        return
    expected = []
    for _, answer in exchanges:
        shown = {"llama": answer.strip(), "gemma": answer.strip(), "mistral": " " + answer}.get(name, answer)
        expected.append(unicodedata.normalize("NFC", shown) if nfc else shown)
    spans = trained_spans(rendered.labels)
    decode = chat.tokenizer.backend_tokenizer.decode
    assert [chat.tokenizer.convert_ids_to_tokens(rendered.input_ids[end - 1]) for _, end in spans] == [END[name]] * len(exchanges)
    read = [decode(rendered.input_ids[start : end - 1], skip_special_tokens=False) for start, end in spans]
    assert read == expected
    assert all(label in (IGNORE, token) for token, label in zip(*rendered, strict=True))


@pytest.mark.parametrize(("name", "nfc"), FORMATS)
def test_plain_conversations_have_the_ids_of_apply_chat_template(name, nfc):
    chat = FORMATS[name, nfc]
    chat.tokenizer.chat_template = chat.jinja
    messages = [{"role": role, "content": f"{text} once more."} for text in ("hello", "the fox") for role in ("user", "assistant")]
    assert render(chat, messages).input_ids == chat.tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize(("name", "nfc"), FORMATS)
def test_an_answer_continues_the_prompt(name, nfc):
    """What the model is asked with when it is used is what stood before the answer in training."""
    chat = FORMATS[name, nfc]
    user = {"role": "user", "content": "hello"}
    whole, prompt = render(chat, [user, {"role": "assistant", "content": "the fox"}]), render_prompt(chat, [user])
    ((start, _),) = trained_spans(whole.labels)
    assert whole.input_ids[:start] == prompt


def test_a_template_that_refuses_a_conversation_is_a_cause():
    with pytest.raises(Refused, match="System role not supported"):
        render(FORMATS["gemma", False], [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
            "no special token: a model trained on it would",
        ),
        ("{% for m in messages %}{{ '<s>' + m['content'] | upper + '</s>' }}{% endfor %}", "rewrites a message"),
        ("{{ '<s>' + messages[-1]['content'] + '</s>' }}", "leaves out, repeats or reorders"),
        ("{{ messages[", "the template refuses it"),
        ("{{ 1 // 0 }}", "the template refuses it: integer division"),
        (None, "no chat template of its own"),
    ],
)
def test_a_template_that_cannot_be_proven_is_refused(template, expected):
    tokenizer = byte_level(False)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=expected):
        ChatFormat(tokenizer, "tokenizer")


@pytest.mark.parametrize("end", ["{{ '</s>' if loop.last else '' }}", "{{ '</s>' if loop.last else '<|eot_id|>' }}"])
def test_a_template_that_ends_earlier_answers_otherwise_is_refused(end):
    """Else the next user's turn would be trained as part of the answer before it."""
    tokenizer = byte_level(False)
    tokenizer.chat_template = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] }}" + end + "{% endfor %}"
    chat = ChatFormat(tokenizer, "tokenizer")
    turns = [{"role": role, "content": text} for text in ("hello", "the fox") for role in ("user", "assistant")]
    assert trained_spans(render(chat, turns[:2]).labels)
    with pytest.raises(Refused, match="the next turn would be trained, too"):
        render(chat, turns)


def test_a_template_that_asks_for_today_is_told_a_fixed_day():
    tokenizer = byte_level(False)
    tokenizer.chat_template = "{{ '<s>Today: ' + strftime_now('%d %b %Y') }}" + LLAMA.replace("{{ bos_token }}", "")
    chat = ChatFormat(tokenizer, "tokenizer")
    ids = render(chat, [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fox"}]).input_ids
    assert tokenizer.decode(ids).startswith("<s>Today: 26 Jul 2024")


def test_tool_calls_are_trained_and_their_results_are_not():
    tokenizer = byte_level(False)
    tokenizer.chat_template = (
        "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% if m['tool_calls'] %}"
        "{{ '<call>' + m['tool_calls'][0]['function'] | tojson + '</call>' }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = ChatFormat(tokenizer, "tokenizer")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "the fox", "tool_calls": [call]},
        {"role": "tool", "content": "43"},
        {"role": "assistant", "content": "world"},
    ]
    (encoded,) = encode_parts(chat, [chat.parts(messages, [{"name": "f"}])])
    shown = '<call>{"name": "f", "arguments": {"x": 1}}</call>'
    assert prove(chat, [encoded]) == [[shown, "the fox" + shown, "world"]]
    assert [[*part.ids] for part in encoded if part.trained and part.text is None] == [[chat.end_id]] * 3
    with pytest.raises(Refused, match="tool calls need the tokenizer's own template"):
        render(ChatFormat(tokenizer), messages)
    call["function"]["arguments"]["x"] = "<|im_end|>"
    with pytest.raises(Refused, match="spells a special token"):
        render(chat, messages)


def test_an_answer_that_is_context_is_written_and_not_trained():
    """Nor is its end token; the ids are those of the conversation as it is."""
    turns = [{"role": role, "content": text} for text in ("hello", "the fox") for role in ("user", "assistant")]
    masked = [turns[0], turns[1] | {"train": False}, *turns[2:]]
    for name in ("chatml", "llama", "mistral"):
        chat = FORMATS[name, False]
        rendered = render(chat, masked)
        assert rendered.input_ids == render(chat, turns).input_ids
        assert len(trained_spans(rendered.labels)) == 1
        assert trained_spans(rendered.labels) == trained_spans(render(chat, turns).labels)[1:]


def test_arguments_for_the_template_reach_it_or_refuse_the_row():
    tokenizer = byte_level(False)
    tokenizer.chat_template = LLAMA.replace("{{ bos_token }}", "{{ bos_token + ('hello' if greet else 'world') }}")
    chat = ChatFormat(tokenizer, "tokenizer")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]
    for greet in (True, False):
        ids = joined(encode_parts(chat, [chat.parts(turns, None, {"greet": greet})])[0]).input_ids
        assert ids == tokenizer.apply_chat_template(turns, greet=greet, return_dict=False)
    for options, cause in (
        ({"greet": True, "mood": "glad"}, "chat_template_kwargs mood is not read by the template, so it would be lost"),
        ({"tokenize": True}, "chat_template_kwargs tokenize is an argument of transformers' own"),
        ({"greet": "<|eot_id|>"}, "spells a special token"),
    ):
        with pytest.raises(Refused, match=cause):
            chat.parts(turns, None, options)
    with pytest.raises(Refused, match="greet is not read by ChatML"):
        FORMATS["chatml", False].parts(turns, None, {"greet": True})


def test_a_span_that_does_not_read_as_its_text_is_found():
    chat = FORMATS["chatml", False]
    (encoded,) = encode_parts(chat, [chat.parts([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fox"}])])
    assert prove(chat, [encoded]) == [["fox"]]
    wrong = [part._replace(ids=part.ids[:-1]) if part.text else part for part in encoded]
    assert prove(chat, [wrong]) == [None]


def test_an_answer_that_would_join_its_header_is_kept_apart_and_counted(tmp_path):
    """ "assistant\\n" and "\\nfox" would share a token, which generation, starting after the header, could never produce."""
    tokenizer = byte_level(False)
    tokenizer.chat_template = ChatFormat(tokenizer).jinja
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "\nfox"}]
    assert render(ChatFormat(tokenizer), messages).input_ids != tokenizer.apply_chat_template(messages, return_dict=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": messages}, {"prompt": "hello", "messages": [messages[0], {"role": "assistant", "content": "fox"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare("sft", ["--source", f"{tmp_path}/rows.jsonl", "--tokenizer", f"{tmp_path}/tokenizer", "--output_dir", f"{tmp_path}/out"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["changes"] == {APART: 1}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["minimind_tokenizer", "qwen3"])
def test_the_templates_of_real_tokenizers(shared_data, tmp_path, folder):
    place = shared_data / folder
    if folder == "qwen3":
        place = tmp_path
        for name, file in (
            ("vocab.json", "vocab.json"),
            ("merges.txt", "merges.txt"),
            ("tokenizer_config.json", "qwen3_tokenizer_config.json"),
        ):
            (place / name).write_bytes((shared_data / "qwen_tokenizer" / file).read_bytes())
    tokenizer = load_tokenizer(place, "tokenizer")
    chat = ChatFormat(tokenizer, "tokenizer")
    messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine, thanks."}]
    rendered = render(chat, messages)
    assert rendered.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    ((start, end),) = trained_spans(rendered.labels)
    assert tokenizer.decode(rendered.input_ids[start:end]) == "Fine, thanks.<|im_end|>"
    assert render_prompt(chat, messages[:1]) == tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    tokenizer.save_pretrained(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy", "tokenizer")
    assert (fingerprint(again), ChatFormat(again, "tokenizer").hash) == (fingerprint(tokenizer), chat.hash)


@settings(max_examples=60, deadline=None)
@example([("hello ", " the fox \n")])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_markers_that_take_white_space_away_give_the_ids_of_apply_chat_template(exchanges):
    """As Phi-3's: what stands beside them in the template, or in a message, is in no id."""
    messages = [{"role": role, "content": text} for pair in exchanges for role, text in zip(("user", "assistant"), pair, strict=True)]
    if any(token in message["content"] for message in messages for token in [*SPECIAL, "<|user|>", "<|assistant|>", "<|end|>"]):
        return  # apply_chat_template would take it for a marker
    rendered = render(STRIPPING, messages)
    assert rendered.input_ids == STRIPPING.tokenizer.apply_chat_template(messages, return_dict=False)
    for turn in range(0, len(messages), 2):
        prompt = STRIPPING.tokenizer.apply_chat_template(messages[: turn + 1], add_generation_prompt=True, return_dict=False)
        assert render_prompt(STRIPPING, messages[: turn + 1]) == prompt == rendered.input_ids[: len(prompt)]


def _stripping() -> ChatFormat:
    tokenizer = byte_level(False)
    tokenizer.add_tokens([AddedToken(token, rstrip=True, special=True) for token in ("<|user|>", "<|assistant|>")])
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True, special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    return ChatFormat(tokenizer, "tokenizer")


STRIPPING = _stripping()


@pytest.mark.parametrize(("user", "answer", "seen"), [("hello", "i am \u00e9", True), ("\u00e9", "i am", False), ("hello", "i am", None)])
def test_an_answer_with_characters_that_the_vocabulary_lacks_is_refused(user, answer, seen):
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", *["hello", "i", "am", "user", "assistant"]])}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    chat = ChatFormat(tokenizer, "tokenizer")
    (proven,) = encode(chat, [chat.parts([{"role": "user", "content": user}, {"role": "assistant", "content": answer}])])
    assert proven.flaws == {True: (LACKING,), False: (LACKING_READ,), None: ()}[seen]


def test_of_several_templates_by_name_the_default_is_taken():
    tokenizer = byte_level(nfc=False)
    tokenizer.chat_template = {"default": LLAMA, "tool_use": GEMMA}
    assert ChatFormat(tokenizer, "tokenizer").jinja == LLAMA
    tokenizer.chat_template = {"tool_use": GEMMA}
    with pytest.raises(ValueError, match="has chat templates named tool_use, and transformers finds none named default"):
        ChatFormat(tokenizer, "tokenizer")
