"""The forms in which a row may hold a conversation or an answer: pairs, exchanges, objects of lists, one message, JSON text."""

import json

import pytest

from data_prep.shapes.columns import USUAL, Columns
from data_prep.shapes.conversations import read_row
from data_prep.shapes.messages import PARTS, Chat, Pair
from posttrain.data.parts import Refused

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
READ = Chat([USER, ASSISTANT])
PART = [{"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    "value",
    [
        {"role": ["user", "assistant"], "content": ["q", "a"]},
        {"from": ["human", "gpt"], "value": ["q", "a"], "weight": [None, 1]},
        json.dumps({"role": ["user", "assistant"], "content": ["q", "a"]}),
        [["q", "a"]],
        [["user", "q"], ["Assistant ", "a"]],
        [{"user": "q", "assistant": "a"}],
        [{"human": "q", "gpt": "a", "system": None}],
        [{"question": "q", "answer": "a"}],
        [{"user": "q"}, {"bot": "a"}],
        [json.dumps(USER), json.dumps(ASSISTANT)],
        json.dumps(json.dumps([USER, ASSISTANT])),
        {"messages": [USER, ASSISTANT], "id": 3},
        [{"role": " User", "content": "q"}, {"role": "Chatbot", "content": "a"}],
        [{"role": "HUMAN", "content": "q"}, {"role": "AI", "content": "a"}],
    ],
)
def test_a_conversation_is_read_in_every_form(value):
    for name in ("messages", "conversations"):
        assert read_row("sft", {name: value}, USUAL) == READ
    assert read_row("sft", {"mine": value}, Columns(names={"messages": "mine"})) == READ


@pytest.mark.parametrize("name", ["environment", "ipython", "Observation", "tool response", "tool_result", "function_response"])
def test_results_of_tools_are_known_by_many_names(name):
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    found = read_row("sft", {"messages": [USER, called, {"role": name, "content": "b"}, ASSISTANT]}, USUAL)
    assert isinstance(found, Chat) and found.messages[2] == {"role": "tool", "content": "b"}


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ({"role": ["user", "assistant"], "content": ["q"]}, "messages holds 2 of role, and 1 of content"),
        ({"role": ["user"], "content": ["q"], "note": "x"}, "messages has note beside its messages, which would be lost"),
        ({"messages": [USER, ASSISTANT], "image": "x"}, "messages has image beside its messages, which would be lost"),
        ({"en": "x", "de": "y"}, "messages is not a list of messages, but an object with en, de"),
        ([["q", "a", "b"]], "messages is not a list of messages"),
        ([{"user": "q", "question": "p", "assistant": "a"}], "a message does not say who speaks; it has user, question, assistant"),
        ([{"user": "q", "assistant": "a", "note": "n"}], "a message has note, which would be lost"),
        ([{"role": "user", "text": "q"}], "a message has no content, but text: name it with --content_key text"),
        ([{"role": "user nr 1", "content": "q"}], "name it with --roles 'user nr 1=user', assistant, system or tool"),
        ([USER | {"a": "x", "b c": [1]}, ASSISTANT | {"d": {"e": 1}}], "a message has a, b c, d, which would be lost: leave them out with"),
    ],
)
def test_other_forms_are_refused_in_a_sentence(value, cause):
    assert cause in str(read_row("sft", {"messages": value}, USUAL))


@pytest.mark.parametrize("answer", [ASSISTANT, {"from": "gpt", "value": "a"}, [ASSISTANT], json.dumps(ASSISTANT), json.dumps([ASSISTANT])])
def test_an_answer_that_is_a_message_is_read_as_one(answer):
    for prompt in ("q", USER, [USER], json.dumps([USER])):
        assert read_row("sft", {"prompt": prompt, "completion": answer}, USUAL)._replace(notes=()) == READ
    if isinstance(answer, str):
        note = "completion read as the JSON text of a message"
        assert read_row("sft", {"prompt": "q", "completion": answer}, USUAL).notes == (note,)
    pair = {"prompt": "q", "chosen": answer, "rejected": ASSISTANT | {"content": "b"}}
    assert read_row("dpo", pair, USUAL) == Pair([USER], "a", "b")


def test_objects_of_lists_are_read_as_prompts_and_answers():
    prompt, chosen, rejected = (
        {"role": [role], "content": [text]} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
    )
    assert read_row("sft", {"prompt": prompt, "completion": chosen}, USUAL) == READ
    assert read_row("dpo", {"prompt": prompt, "chosen": chosen, "rejected": rejected}, USUAL) == Pair([USER], "a", "b")


@pytest.mark.parametrize("answer", [json.dumps(USER), json.dumps([USER, ASSISTANT]), '{"role": "admin"}', '{"content": "a"}', "[1]", "{}"])
def test_json_that_is_no_answer_is_the_answers_text(answer):
    assert read_row("sft", {"prompt": "q", "completion": answer}, USUAL) == Chat([USER, ASSISTANT | {"content": answer}])


def test_contents_as_json_text_of_parts_are_read_and_told():
    for messages in ([USER | {"content": json.dumps(PART)}, ASSISTANT], [USER | {"content": " " + json.dumps(PART)}, ASSISTANT]):
        assert read_row("sft", {"messages": messages}, USUAL) == READ._replace(notes=(PARTS,))
    picture = json.dumps([*PART, {"type": "image_url", "image_url": "x"}])
    assert "a message holds image_url" in str(read_row("sft", {"messages": [USER | {"content": picture}, ASSISTANT]}, USUAL))
    for text in ('[{"type": "circle", "text": "q"}]', '[{"text": "q"}]', '[{"type": "text"'):
        found = read_row("sft", {"messages": [USER | {"content": text}, ASSISTANT]}, USUAL)
        assert found == Chat([USER | {"content": text}, ASSISTANT])


def test_a_result_of_a_tool_stays_the_text_that_it_is():
    called, text = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, '[{"type":"text","text":"b"}]'
    found = read_row("sft", {"messages": [USER, called, {"role": "tool", "content": text}, ASSISTANT]}, USUAL)
    assert not isinstance(found, Refused) and found.messages[2]["content"] == text
