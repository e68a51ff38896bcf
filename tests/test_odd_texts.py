"""What is odd about the texts of a row: nulls of tables are no text, marks of a chat are told, and a repeated prompt is taken off."""

import json

import pytest

from data_prep.shapes.columns import USUAL
from data_prep.shapes.conversations import read_row
from data_prep.shapes.messages import Chat, Document, Pair
from data_prep.shapes.odd_texts import IN_CHAT_FORM, MARKS, NO_LETTER, NULL_ANSWERS, REPEATED
from posttrain.data.parts import Refused

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROW, PAIR = {"prompt": "q", "response": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}
ASKED = "What is a plum?"


def read(row: dict, kind: str = "sft") -> str | tuple:
    item = read_row(kind, row, USUAL)
    return str(item) if isinstance(item, Refused) else item.notes


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "null", "NULL", "<NA>", " nan\n"])
def test_what_tables_write_for_null_is_no_text(text):
    cause = f"is the text {text.strip()!r}, which tables write for null"
    for row in (
        ROW | {"prompt": text},
        ROW | {"system": text},
        {"messages": [USER | {"content": text}, ASSISTANT]},
        {"messages": [{"role": "system", "content": text}, USER, ASSISTANT]},
        {"instruction": "q", "input": text, "output": "a"},
        {"text": text},
    ):
        assert cause in read(row), row
    for name in PAIR:
        assert cause in read(PAIR | {name: text}, "dpo")
    # it may be a right answer, or a reply to one
    assert read(ROW | {"response": text}) == (NULL_ANSWERS,)
    assert read({"messages": [USER, ASSISTANT, USER | {"content": text}, ASSISTANT]}) == ()


def test_words_that_only_look_so_are_texts():
    for text in ("none", "Nothing", "nan bread", "Null."):
        assert read(ROW | {"prompt": text, "response": text}) == () == read({"text": text}) == read(PAIR | {"chosen": text}, "dpo")


@pytest.mark.parametrize("text", ["-", ".", "?", "...", "n/a", "N/A"])
def test_a_question_without_a_letter_is_told(text):
    assert read(ROW | {"prompt": text}) == (NO_LETTER,) == read(PAIR | {"prompt": text}, "dpo")
    assert read({"messages": [USER, ASSISTANT, USER | {"content": text}, ASSISTANT]}) == (NO_LETTER,)
    assert read(ROW | {"response": text}) == () == read(ROW | {"prompt": "7"}) == read(ROW | {"prompt": "何"})


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nhi<|im_end|>",
        "[INST] hi [/INST] yo",
        "### Instruction:\nhi\n\n### Response:\nyo",
        "Below is a task.\n\n### Instruction:\nhi\n\n### Response:",
        "Human: hi\nAssistant: yo\nHuman: more",
        "A chat between a curious user and an assistant. USER: hi ASSISTANT: yo",
        "<start_of_turn>user\nhi",
    ],
)
def test_marks_of_a_chat_in_a_text_are_told_wherever_it_stands(text):
    for row in (ROW | {"prompt": text}, ROW | {"response": text}, {"messages": [USER | {"content": text}, ASSISTANT]}):
        assert read(row) == (MARKS,)
    for name in PAIR:
        assert read(PAIR | {name: text}, "dpo") == (MARKS,)
    assert read({"text": text}) == (IN_CHAT_FORM,)


def test_texts_that_speak_of_chats_are_not_told():
    for text in ("The assistant: a study of users", "Use INST] no", "## Input", "a <|b|> c", "Dear Assistant: I am a human.", "Input: 3"):
        assert read(ROW | {"prompt": text, "response": text}) == ()


CHAT = [USER, ASSISTANT]


@pytest.mark.parametrize(
    "text",
    [
        "USER: hi ASSISTANT: yo</s>",
        "A chat. USER: hi ASSISTANT: yo",
        "GPT4 Correct User: hi<|end_of_turn|>GPT4 Correct Assistant: yo",
        "User: a line of a file",
        "Assistant: and the next",
        json.dumps(CHAT),
        json.dumps({"messages": CHAT}),
        str(CHAT),
    ],
)
def test_a_plain_text_that_is_a_chat_is_told(text):
    assert read_row("sft", {"text": text}, USUAL) == Document(text, (IN_CHAT_FORM,))


def test_json_that_is_no_chat_is_plain_text():
    for text in ('{"role": "admin"', '{"from": "here", "to": 3}', "[1, 2]", '{"a": [{"b": "role"}]}'):
        assert read({"text": text}) == ()


def test_a_prompt_that_both_answers_repeat_is_taken_off():
    for between in (" ", "\n\n"):
        row = {"prompt": ASKED, "chosen": f"{ASKED}{between}A fruit.", "rejected": f"{ASKED}{between}A chair."}
        assert read_row("dpo", row, USUAL) == Pair([USER | {"content": ASKED}], "A fruit.", "A chair.", notes=(REPEATED,))
    for name in ("chosen", "rejected"):
        assert "one answer alone begins with the prompt" in read(PAIR | {"prompt": ASKED, name: f"{ASKED} A fruit."}, "dpo")
    assert read({"prompt": ASKED, "chosen": ASKED, "rejected": f"{ASKED} A chair."}, "dpo") == "an answer is nothing but the prompt"
    assert read_row("dpo", {"prompt": "A", "chosen": "A plum", "rejected": "A chair"}, USUAL) == Pair(
        [USER | {"content": "A"}], "A plum", "A chair"
    )
    assert read_row("sft", ROW | {"prompt": ASKED, "response": f"{ASKED} A fruit."}, USUAL) == Chat(
        [USER | {"content": ASKED}, ASSISTANT | {"content": f"{ASKED} A fruit."}]
    )
