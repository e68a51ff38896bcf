"""Rows of plain messages are read in a short way, as the long one reads them."""

import random

from data_prep.shapes.columns import NAMES, USUAL, Columns
from data_prep.shapes.conversations import read_row
from data_prep.shapes.messages import Chat
from data_prep.shapes.plain import plain_chat

LONG = Columns(ignore=("no such column",))  # with which every row is read in the long way


def test_plain_rows_are_read_as_all_others():
    draw = random.Random(0)
    few, odd = (lambda values, others: others[draw.randrange(len(others))] if draw.random() < 0.06 else draw.choice(values)), {}
    texts = ["the fox", "two\nlines", "日本 é", "a\tb", "  spaced  "]
    odd_texts = ["", "  ", "\n", None, 3, "a\x00b", "half \ud800", "\x7f", "\u00a0", ["x"], [{"type": "text", "text": "x"}], "<think>\nx"]
    taken = 0
    for _ in range(20_000):
        messages, roles = [], draw.choice([("user", "assistant"), ("human", "gpt")])
        for number in range(draw.randint(1, 5)):
            role = few([roles[number % 2]], ["system", "tool", "User", "developer", "function_call", None, 7, roles[0], roles[1]])
            keys = few([("role", "content")] if roles[0] == "user" else [("from", "value")], [("role", "value"), ("speaker", "text")])
            message = {keys[0]: role, keys[1]: few(texts, odd_texts)}
            if draw.random() < 0.02:
                message |= few([{"weight": 0}], [{"name": "x"}, {"id": 3}, {"tool_calls": None}, {"content": "y"}])
            messages.append(dict(draw.sample([*message.items()], len(message))))
        if draw.random() < 0.2:
            messages.insert(0, {"role": "system", "content": few(texts, odd_texts)})
        row = {
            few(["messages", "conversations"], ["Messages", "conversation", "text", "dialog"]): few([messages], [None, [], "x", [None], {}])
        }
        for _ in range(draw.choice([0, 0, 1, 2])):
            name = few(["id", "source", "lang", "conversation_id"], ["label", "Label", "tools", "system", "images", "messages", "weight"])
            row[name] = few(["x", 7, 0.5, True], [None, float("nan"), "", " ", [], {}, [1], {"a": 1}])
        row = dict(draw.sample([*row.items()], len(row)))
        long, short = read_row("sft", row, LONG), plain_chat(row)
        assert short is None or short == long, row
        assert repr(read_row("sft", row, USUAL)) == repr(long), row
        taken += isinstance(short, Chat)
        odd[type(long).__name__] = odd.get(type(long).__name__, 0) + 1
    assert taken > 3000 and odd["Refused"] > 3000, (taken, odd)
    assert plain_chat({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": 1}) is not None
    assert {"messages", "conversations"} <= {*NAMES["messages"]}
