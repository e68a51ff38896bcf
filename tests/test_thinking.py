"""Thinking before an answer: written as the template writes it, each answer trained once, after what the model sees when it is used."""

import json

import pytest
from shown import shown
from test_templates import byte_level

from data_prep.examples import DPO, SEVERAL
from data_prep.prepare import prepare
from data_prep.shapes.thinking import DROPPED, EMPTY, KEPT
from posttrain.data.chat import ChatFormat, encode_parts, render_prompt
from posttrain.data.encoded import joined, trained_spans
from posttrain.data.prepared import load_prepared
from posttrain.data.thinking import only_trained
from posttrain.data.tokenization import load_tokenizer
from posttrain.model.describe import write_tokenizer

START, STOP = "{{ '<|im_start|>' + m['role'] + '\n' }}", "{{ '<|im_end|>\n' }}"
ASKED = "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}%s{%% endif %%}"
# a block before the last answer, and thinking in the turns after the last question only, as in Qwen3
LATEST = (
    "{% set ns = namespace(q=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.q = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}" + START + "{% if m['role'] == 'assistant' and loop.index0 > ns.q and (loop.last or m['reasoning_content']) %}"
    "{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function'] | tojson + '</call>' }}{% endfor %}" + STOP + "{% endfor %}"
)
LATEST += ASKED % "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
PLAIN = "{% for m in messages %}" + START + "{{ m['content'] }}" + STOP + "{% endfor %}" + ASKED % ""
# thinking is written nowhere, and the header of an answer opens it, as in DeepSeek-R1
OPENING = "{% for m in messages %}" + START + "{{ m['content'].split('</think>')[-1] }}" + STOP + "{% endfor %}"
OPENING += ASKED % "{{ '<think>\n' }}"
USER, AGAIN = ({"role": "user", "content": text} for text in ("hello", "once more"))
ASK, ASK_AGAIN = (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("hello", "once more"))
BLOCK = "<think>\n\n</think>\n\n"


def answer(content: str, thinking: str | None = None, **more) -> dict:
    return {"role": "assistant", "content": content} | ({"reasoning_content": thinking} if thinking else {}) | more


def form(template: str | None) -> ChatFormat:
    tokenizer = byte_level(False)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, "tokenizer" if template else "chatml")


FORMS = {"latest": form(LATEST), "plain": form(PLAIN), "opening": form(OPENING), "chatml": form(None)}


@pytest.mark.parametrize(
    "told",
    [answer("the fox", "two"), answer("<think>\ntwo\n</think>\n\nthe fox"), answer("<think>two</think>the fox")],
)
@pytest.mark.parametrize(
    ("name", "expected", "note"),
    [
        ("latest", "[[<think>\ntwo\n</think>\n\nthe fox<|im_end|>]]\n", KEPT["own"]),
        ("plain", "[[<think>\ntwo\n</think>\n\nthe fox<|im_end|>]]\n", KEPT["content"]),
        ("chatml", "[[<think>\ntwo\n</think>\n\nthe fox<|im_end|>]]\n", KEPT["content"]),
        ("opening", "<think>\n[[two\n</think>\n\nthe fox<|im_end|>]]\n", KEPT["header"]),  # the header is not trained
    ],
)
def test_thinking_is_trained_in_one_form_wherever_a_row_has_it(name, expected, note, told):
    texts, changes = shown(FORMS[name], {"messages": [USER, told]})
    assert texts == [ASK + expected]
    assert changes == {note: 1}
    texts, changes = shown(FORMS[name], {"messages": [USER, told]}, thinking="drop")
    assert texts == [ASK + ("" if name != "latest" else BLOCK) + "[[the fox<|im_end|>]]\n"]
    assert changes == {DROPPED: 1}


def test_a_template_that_knows_thinking_gives_its_own_ids():
    chat = FORMS["latest"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [USER, answer("", "two", tool_calls=[call]), {"role": "tool", "content": "3"}, answer("the fox", "four")]
    (text,), _ = shown(chat, {"messages": turns})
    assert text.replace("[[", "").replace("]]", "") == chat.tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.count("[[<think>") == 2  # a chain of tools keeps its thinking, so it is one example
    (text,), _ = shown(chat, {"messages": [USER, answer("", tool_calls=[call])]})
    assert text.startswith(ASK + BLOCK + "[[<call>")  # the template's block is not a part of the call


def test_an_answer_is_trained_once_after_what_the_template_leaves_of_the_turns_before():
    texts, changes = shown(FORMS["latest"], {"messages": [USER, answer("the fox", "two"), AGAIN, answer("world", "four")]})
    first = ASK + "[[<think>\ntwo\n</think>\n\nthe fox<|im_end|>]]\n"
    assert texts == [first, ASK + "the fox<|im_end|>\n" + ASK_AGAIN + "[[<think>\nfour\n</think>\n\nworld<|im_end|>]]\n"]
    assert changes == {KEPT["own"]: 1, SEVERAL: 1}
    # an answer without thinking stands after the template's block, which nobody learns to write
    texts, _ = shown(FORMS["latest"], {"messages": [USER, answer("the fox", "two"), AGAIN, answer("world")]})
    assert texts == [first, ASK + "the fox<|im_end|>\n" + ASK_AGAIN + BLOCK + "[[world<|im_end|>]]\n"]
    # the template alone decides: what it writes otherwise later is context
    texts, _ = shown(FORMS["latest"], {"messages": [USER, answer("the fox", "two"), AGAIN, answer("world")]}, thinking="template")
    assert texts == [ASK + "the fox<|im_end|>\n" + ASK_AGAIN + BLOCK + "[[world<|im_end|>]]\n"]
    # and where every turn keeps its thinking, there is one example
    texts, _ = shown(FORMS["plain"], {"messages": [USER, answer("the fox", "two"), AGAIN, answer("world")]})
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("name", "told", "cause"),
    [
        ("latest", "two\n</think>\n\nthe fox", "has </think> without <think>"),
        ("latest", "<think>\ntwo", "opens <think> and does not close it"),
        ("latest", "<think>\ntwo\n</think>\n\n", "nothing but thinking"),
    ],
)
def test_half_a_thought_is_refused(name, told, cause):
    assert cause in shown(FORMS[name], {"messages": [USER, answer(told)]})[0]


def test_a_header_that_opens_thinking_lets_the_answer_close_it():
    assert shown(FORMS["opening"], {"messages": [USER, answer("two\n</think>\n\nthe fox")]})[0] == [
        ASK + "<think>\n[[two\n</think>\n\nthe fox<|im_end|>]]\n"
    ]


@pytest.mark.parametrize("told", ["<think>\ntwo\n</think>\n\nthe fox", "two\n</think>\n\nthe fox", "<think>\n\n</think>\n\nthe fox"])
def test_thinking_that_stands_in_a_field_and_in_the_text_is_trained_once(told):
    for chat in FORMS.values():
        both, once = ([USER, answer(content, "two")] for content in (told, "the fox"))
        assert shown(chat, {"messages": both})[0] == shown(chat, {"messages": once})[0]
        worse = [USER, answer("world", "four")]
        assert shown(chat, {"chosen": both, "rejected": worse}, DPO)[0] == shown(chat, {"chosen": once, "rejected": worse}, DPO)[0]


def test_thinking_that_would_be_lost_or_contradicted_is_refused():
    assert "knows no thinking" in shown(FORMS["plain"], {"messages": [USER, answer("fox", "two")]}, thinking="template")[0]
    off = {"messages": [USER, answer("fox", "two")], "chat_template_kwargs": {"enable_thinking": False}}
    assert "switch thinking off" in shown(FORMS["latest"], off)[0]
    for told in ("<think>three</think>fox", "three</think>fox", "so <think>three</think> fox", "<think>two</think>three</think>fox"):
        for name in FORMS:
            row = [USER, answer(told, "two")]
            assert "other thinking in its text" in shown(FORMS[name], {"messages": row})[0]
            assert "other thinking in its text" in shown(FORMS[name], {"chosen": [USER, answer("fox")], "rejected": row}, DPO)[0]


def test_an_empty_thought_is_not_taught():
    for name, header in (("latest", BLOCK), ("plain", "")):
        texts, changes = shown(FORMS[name], {"messages": [USER, answer(BLOCK + "the fox")]})
        assert texts == [ASK + header + "[[the fox<|im_end|>]]\n"]
        assert changes == {EMPTY: 1}


def test_a_marker_of_thinking_that_is_a_special_token_is_one_where_it_is_the_formats_and_text_elsewhere():
    tokenizer = byte_level(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chat = ChatFormat(tokenizer)
    rows = [answer("the fox", "two"), answer("two <think> and </think> once")]
    for told, count in zip(rows, (1, 0), strict=True):
        texts, _ = shown(chat, {"messages": [USER, told]})
        assert len(texts) == 1
        ids = [token for part in chat.parts([USER, told]) for token in getattr(part, "ids", [])]
        assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == count


def test_both_answers_of_a_pair_think_after_the_same_prompt():
    pair = {"prompt": "hello", "chosen": "<think>two</think>the fox", "rejected": "<think>four</think>world"}
    ((text,), changes) = shown(FORMS["latest"], pair, DPO)
    answers = ["[[<think>\ntwo\n</think>\n\nthe fox<|im_end|>]]", "[[<think>\nfour\n</think>\n\nworld<|im_end|>]]"]
    assert text == ASK + "".join(answers)
    assert changes == {KEPT["own"]: 1}
    messages = {"chosen": [USER, answer("the fox", "two")], "rejected": [USER, answer("world", "four")]}
    assert shown(FORMS["latest"], messages, DPO)[0] == [text]
    assert "another prompt for the rejected answer" in shown(FORMS["latest"], pair | {"rejected": "world"}, DPO)[0]
    assert shown(FORMS["chatml"], pair | {"rejected": "world"}, DPO)[0] == [ASK + answers[0] + "[[world<|im_end|>]]"]


def test_an_answer_of_several_channels_is_trained_with_the_markers_between_them():
    """As gpt-oss writes it: special tokens stand inside the answer, and an earlier answer has another end."""
    tokenizer = byte_level(False)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m['thinking'] and loop.last %}"
        "{{ '<|eot_id|>' + m['thinking'] + '<|im_end|><|im_start|>assistant' }}{% endif %}{{ '<|start_header_id|>' + m['content'] }}"
        "{{ '</s>' if loop.last else '<|im_end|>' }}{% else %}{{ '<|im_start|>user' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    chat = ChatFormat(tokenizer, "tokenizer")
    ask = "<|im_start|>userhello<|im_end|><|im_start|>assistant"
    told = "[[<|eot_id|>%s<|im_end|><|im_start|>assistant<|start_header_id|>%s</s>]]"
    texts, _ = shown(chat, {"messages": [USER, answer("the fox", "two"), USER, answer("world", "four")]})
    assert texts == [ask + told % ("two", "the fox"), ask + "<|start_header_id|>the fox<|im_end|>" + ask + told % ("four", "world")]
    pair = {"prompt": "hello", "chosen": "<think>two</think>the fox", "rejected": "<think>four</think>world"}
    assert shown(chat, pair, DPO)[0] == [ask + told % ("two", "the fox") + told % ("four", "world")]


@pytest.mark.parametrize("name", FORMS)
def test_a_model_is_asked_as_it_was_trained_wherever_it_is_asked(name, tmp_path):
    """With thinking and without: the ids before what is trained are those that it is asked with, also by programs that read its folder."""
    FORMS[name].tokenizer.save_pretrained(tmp_path / "base")
    for thinking in ("two", None):
        template = FORMS[name].template
        chat = ChatFormat(load_tokenizer(tmp_path / "base", template), template)
        chat.thinks = bool(thinking)
        (tmp_path / str(thinking)).mkdir()
        write_tokenizer(chat, tmp_path / str(thinking))
        again = ChatFormat(load_tokenizer(tmp_path / str(thinking), template), template)
        for asked in ([USER], [USER, answer("the fox"), AGAIN]):
            turns = [*only_trained(asked, set()), answer("world", thinking)]
            whole = joined(encode_parts(chat, [chat.parts(turns)])[0])
            start = trained_spans(whole.labels)[-1][0]
            assert render_prompt(chat, asked) == render_prompt(again, asked) == whole.input_ids[:start]
            how = {"chat_template": chat.asking_jinja, "add_generation_prompt": True, "return_dict": False}
            if thinking or name != "opening":  # whose header opens thinking, whatever it is told
                assert chat.tokenizer.apply_chat_template(asked, **how) == render_prompt(chat, asked)


def test_rows_with_thinking_are_prepared_and_counted(tmp_path):
    tokenizer = byte_level(False)
    tokenizer.chat_template = LATEST
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    story = " ".join(f"the fox {i}" for i in range(40))
    rows = [{"messages": [USER, answer(story, f"{i}"), AGAIN, answer("hello world", f"two {i}")]} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--source", f"{tmp_path}/rows.jsonl", "--tokenizer", f"{tmp_path}/tokenizer", "--template", "tokenizer", "--val_size", "0"]
    prepare("sft", [*common, "--output_dir", f"{tmp_path}/out", "--duplicates", "near"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["changes"] == {KEPT["own"]: 3, SEVERAL: 3}
    assert manifest["thinks"]
    assert len(load_prepared(str(tmp_path / "out"), "sft", "").train) == 4  # the second answers differ, and are no copies of the first ones
    prepare("sft", [*common, "--output_dir", f"{tmp_path}/other", "--thinking", "drop"])
    assert len(load_prepared(str(tmp_path / "other"), "sft", "").train) == 1  # all the same, without their thinking
