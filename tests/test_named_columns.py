"""A column that the user has named is read, or the row is refused: it is never only told as not used."""

import pytest

from data_prep.shapes.columns import Columns
from data_prep.shapes.conversations import read_row
from data_prep.shapes.messages import Chat
from posttrain.data.parts import Refused

SYSTEM, USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("system", "s"), ("user", "q"), ("assistant", "a")))
TALK, PAIR = {"messages": [USER, ASSISTANT]}, {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("kind", "row", "what", "why"),
    [
        ("sft", {"text": "a document"}, "system", "nothing takes it beside text"),
        ("sft", TALK, "context", "nothing takes it beside messages"),
        ("sft", TALK, "answer", "nothing takes it beside messages"),
        ("sft", TALK, "chosen", "nothing takes it beside messages"),
        ("sft", {"messages": [SYSTEM, *TALK["messages"]]}, "system", "the messages begin with another system message"),
        ("sft", {"messages": [USER, ASSISTANT | {"reasoning": "t"}]}, "thinking", "nothing takes it beside messages"),
        ("sft", {"query": "q", "answers": [{"name": "f"}], "tools": [{"name": "f"}]}, "context", "beside answers, query, tools"),
        ("dpo", PAIR, "thinking", "nothing takes it beside chosen, prompt, rejected"),
        ("dpo", PAIR, "answer", "nothing takes it beside chosen, prompt, rejected"),
        ("dpo", {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT | {"content": "b"}]}, "text", "beside chosen, rejected"),
    ],
)
def test_a_named_column_that_is_not_used_refuses_the_row(kind, row, what, why):
    row, named = row | {"mine": "word"}, {what: "mine"}
    cause = str(read_row(kind, row, Columns(names=named)))
    assert cause.startswith(f"column mine, named by --columns {what}=mine, would be lost: ") and why in cause, cause
    assert cause.endswith("leave it out with --ignore mine")
    for empty in (row | {"mine": None}, row | {"mine": " "}):
        assert not isinstance(read_row(kind, empty, Columns(names=named)), Refused)
    assert not isinstance(read_row(kind, row, Columns(names=named, ignore=("mine",))), Refused)


def test_a_named_system_message_that_the_messages_repeat_is_used():
    row = {"messages": [SYSTEM, USER, ASSISTANT], "mine": "s"}
    assert read_row("sft", row, Columns(names={"system": "mine"})) == Chat([SYSTEM, USER, ASSISTANT])
