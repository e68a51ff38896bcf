"""Tool calls and descriptions of tools: what either says besides is refused with its key, and what says nothing is none."""

import json

import pytest

from data_prep.shapes.columns import USUAL, Columns
from data_prep.shapes.conversations import read_row
from data_prep.shapes.messages import Chat
from posttrain.data.parts import Refused

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RESULT = {"role": "tool", "content": "1"}
FUNCTION = {"name": "f", "arguments": {"x": 1}}
CALL = {"type": "function", "function": FUNCTION}
READ = Chat([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ASSISTANT])


def read(more: dict, result: dict = RESULT, columns: Columns = USUAL, **row) -> Chat | str:
    """A conversation in which an answer has these keys; why it is refused, as text."""
    item = read_row("sft", {"messages": [USER, {"role": "assistant", "content": "", **more}, result, ASSISTANT], **row}, columns)
    return str(item) if isinstance(item, Refused) else item


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": [CALL], "function_call": FUNCTION},
        {"tool_calls": json.dumps([CALL]), "function_call": {"name": None, "arguments": None}},
        {"tool_calls": [json.dumps(CALL)], "function_call": "null"},
        {"tool_calls": [CALL | {"index": 0, "name": "f", "description": "d", "function": json.dumps(FUNCTION)}]},
        {"tool_calls": [{"function": "f", "arguments": '{"x": 1}'}]},
        {"tool_calls": [{"function": FUNCTION | {"parameters": None, "args": {}, "strict": False}}]},
        {"tool_calls": [{"name": "f", "arguments": "{}", "parameters": {"x": 1}}]},
    ],
)
def test_a_call_is_read_in_every_form_that_says_the_same(more):
    assert read(more) == READ


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"tool_calls": [CALL | {"result": "5"}]}, "a tool call has result, which would be lost: leave it out with --ignore result"),
        ({"tool_calls": [{"function": FUNCTION | {"parameters": {"y": 2}}}]}, "a tool call has parameters, which would be lost"),
        ({"tool_calls": [{"function": "f", "arguments": {"x": 1}, "note": "n"}]}, "a tool call has note, which would be lost"),
        ({"tool_calls": [CALL], "function_call": FUNCTION | {"name": "g"}}, "a message has tool calls in two keys that differ"),
    ],
)
def test_what_a_call_says_besides_is_refused_with_its_key(more, cause):
    assert cause in read(more)
    key = "function_call" if "two keys" in cause else cause.split(" has ")[1].split(",")[0]
    assert read(more, columns=Columns(ignore=(key,))) == READ


@pytest.mark.parametrize("arguments", [5, [1], "5", '"x"', "[1]", True])
def test_arguments_that_are_no_object_are_refused(arguments):
    assert "a tool call's arguments are a" in read({"tool_calls": [{"name": "f", "arguments": arguments}]})


@pytest.mark.parametrize("calls", [None, "", "null", "None", "[]", "{}", [], {}, [None], [{}], [{"function": {"name": None}}]])
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_that_say_nothing_are_none(key, calls):
    row = {"messages": [USER | {key: calls}, ASSISTANT | {key: calls}]}
    assert read_row("sft", row, USUAL) == Chat([USER, ASSISTANT])


def test_a_result_has_no_calls_and_no_thinking_and_names_are_texts():
    assert "a message of the role tool has reasoning, which would be lost" in read({"tool_calls": [CALL]}, RESULT | {"reasoning": "t"})
    assert "a message's name is a int, not text" in read({"tool_calls": [CALL]}, RESULT | {"name": 5})
    assert "a message's name is a int, not text" in read({"tool_calls": [CALL], "name": 5})
    assert "a description of tools has a name that is no text" in read({"tool_calls": [CALL]}, tools=[{"name": ["f"]}])
    assert "a tool's result holds what JSON has not" in read({"tool_calls": [CALL]}, RESULT | {"content": {"x": float("nan")}})


def test_ids_that_are_numbers_are_texts():
    item = read({"tool_calls": [CALL | {"id": 7}]}, RESULT | {"tool_call_id": 7})
    assert isinstance(item, Chat) and item.messages[1]["tool_calls"][0]["id"] == item.messages[2]["tool_call_id"] == "7"


@pytest.mark.parametrize("schema", [{"type": "object", "properties": {"x": {"type": "integer"}}}, {}])
def test_descriptions_as_json_text_anywhere_are_read(schema):
    whole = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for function in ({"name": "f", "parameters": json.dumps(schema)}, json.dumps(whole[0]["function"])):
        assert read({"tool_calls": [CALL]}, tools=[{"type": "function", "function": function}]) == READ._replace(tools=whole)
    wrong = [{"name": "f", "parameters": "{x: int}"}]
    assert read({"tool_calls": [CALL]}, tools=wrong) == "parameters of a tool: not valid JSON"
    assert "holds no object" in read({"tool_calls": [CALL]}, tools=[{"name": "f", "parameters": "[1]"}])


def test_keys_of_messages_that_carry_no_text_are_told():
    item = read_row("sft", {"messages": [USER | {"turn": 1}, ASSISTANT | {"turn": 2, "ok": True}], "id": 1}, USUAL)
    assert item == Chat([USER, ASSISTANT], notes=("key of messages not used: ok", "key of messages not used: turn", "column not used: id"))
    other = {"prompt": [USER | {"turn": 1}], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": "b"}]}
    assert read_row("dpo", other, USUAL).notes == ("key of messages not used: turn",)
