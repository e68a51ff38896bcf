"""Shapes of rows: every known one is read, a row that cannot be used is refused under its cause, and nothing of a row is lost unsaid."""

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.formats.rows import file_rows
from data_prep.shapes.columns import USUAL
from data_prep.shapes.conversations import best_paths, conversations, read_row
from data_prep.shapes.messages import Chat, Document, Pair
from posttrain.data.parts import Refused

SYSTEM, USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("system", "s"), ("user", "q"), ("assistant", "a")))
OTHER, HH = {"role": "assistant", "content": "b"}, "\n\nHuman: q\n\nAssistant: a"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"name": "f"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, Chat([USER, ASSISTANT])),
        ({"instruction": "q", "input": None, "output": "a"}, Chat([USER, ASSISTANT])),
        ({"instruction": "q", "input": "more", "output": "a"}, Chat([{"role": "user", "content": "q\n\nmore"}, ASSISTANT])),
        ({"instruction": "q", "input": "", "output": "a", "history": [["q", "a"]]}, Chat([USER, ASSISTANT, USER, ASSISTANT])),
        ({"instruction": "q", "context": "more", "response": "a"}, Chat([{"role": "user", "content": "q\n\nmore"}, ASSISTANT])),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, Chat([SYSTEM, USER, ASSISTANT])),
        ({"prompt": "q", "response": "a"}, Chat([USER, ASSISTANT])),
        ({"prompt": "q", "completion": "a"}, Chat([USER, ASSISTANT])),
        ({"question": "q", "answer": "a"}, Chat([USER, ASSISTANT])),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, Chat([SYSTEM, USER, ASSISTANT])),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]}, Chat([USER, ASSISTANT])),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            Chat([SYSTEM, USER, ASSISTANT]),
        ),
        (
            {"conversations": [{"from": "Human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Chat([SYSTEM, USER, ASSISTANT]),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": '[{"name": "f"}]',
            },
            Chat([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, ASSISTANT], TOOLS),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": TOOLS},
            Chat([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], TOOLS),
        ),
        ({"text": "a document"}, Document("a document")),
    ],
)
def test_sft_shapes(row, expected):
    assert read_row("sft", row, USUAL) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, Pair([SYSTEM, USER], "a", "b")),
        ({"instruction": "q", "input": "", "output": "x", "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
        ({"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"}, Pair([SYSTEM, USER], "a", "b")),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, Pair([USER], "a", "b")),
        ({"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, Pair([USER], "a", "b")),
        ({"prompt": "q", "chosen": [ASSISTANT], "rejected": [OTHER]}, Pair([USER], "a", "b")),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, Pair([SYSTEM, USER], "a", "b")),
        ({"prompt": HH.removesuffix(" a"), "chosen": "a", "rejected": "b"}, Pair([USER], "a", "b")),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant: a", "rejected": HH + "\n\nHuman: q\n\nAssistant: b"},
            Pair([USER, ASSISTANT, USER], "a", "b"),
        ),
        (
            {"input": {"messages": [SYSTEM, USER]}, "preferred_output": [ASSISTANT], "non_preferred_output": [OTHER]},
            Pair([SYSTEM, USER], "a", "b"),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": OTHER, "system": "s"},
            Pair([SYSTEM, USER], "a", "b"),
        ),
    ],
)
def test_dpo_shapes(row, expected):
    assert read_row("dpo", row, USUAL)._replace(notes=()) == expected


def chat(*messages, **more) -> dict:
    return {"messages": list(messages), **more}


def said(role, content) -> dict:
    return {"role": role, "content": content}


MALFORMED_SFT = [
    ({"prompt": "q", "response": ""}, "response is empty"),
    ({"prompt": "q", "response": " \n\t"}, "response is empty"),
    ({"prompt": "", "response": "a"}, "prompt is empty"),
    ({"prompt": None, "response": "a"}, "prompt is null"),
    ({"prompt": "q", "response": None}, "response is null"),
    ({"prompt": 3, "response": "a"}, "prompt is a int, not text"),
    ({"prompt": "q", "response": ["a"]}, "response is a list, not text"),
    ({"prompt": "q\x00", "response": "a"}, "prompt holds control characters"),
    ({"prompt": "q", "response": "a\x1b[31m"}, "response holds control characters"),
    ({"prompt": "q", "response": "\ud83d"}, "response holds half a surrogate pair"),
    ({"prompt": "q", "response": "a", "system": 7}, "system is a int, not text"),
    ({"instruction": "q", "input": 5, "output": "a"}, "input is a int, not text"),
    ({"instruction": "q", "input": "", "output": "a", "history": [["q"]]}, "history is not a list"),
    ({"instruction": "q", "input": "", "output": "a", "history": [["q", ""]]}, "history is empty"),
    (chat(), "messages is not a list of messages"),
    ({"messages": None}, "messages is null"),
    ({"messages": "hello"}, "messages is not a list of messages"),
    ({"messages": ["hello"]}, "messages is not a list of messages"),
    (chat(USER), "last message is not the assistant's"),
    (chat(USER, ASSISTANT, USER), "last message is not the assistant's"),
    (chat(ASSISTANT), "wrong order of roles: assistant first"),
    (chat(ASSISTANT, USER, ASSISTANT), "wrong order of roles: assistant first"),
    (chat(USER, USER, ASSISTANT), "wrong order of roles: user after user"),
    (chat(USER, ASSISTANT, ASSISTANT), "wrong order of roles: assistant after assistant"),
    (chat(USER, SYSTEM, ASSISTANT), "wrong order of roles: system after user"),
    (chat(SYSTEM, SYSTEM, USER, ASSISTANT), "wrong order of roles: system after system"),
    (chat(USER, said("tool", "x"), ASSISTANT), "wrong order of roles: tool after user"),
    (chat(USER, said("robot", "a")), "unknown role 'robot'"),
    (chat(USER, said(None, "a")), "unknown role None"),
    (chat(USER, said(["assistant"], "a")), "unknown role"),
    (chat(USER, {"content": "a"}), "unknown role None"),
    (chat(USER, {"role": "assistant"}), "a message is null"),
    (chat(USER, said("assistant", "")), "a message is empty"),
    (chat(USER, said("assistant", {"text": "a"})), "a message is a dict, not text"),
    (chat(said("user", [{"type": "image_url"}]), ASSISTANT), "something other than text"),
    (chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}), "no name or no arguments"),
    (chat(USER, {"role": "assistant", "content": "", "tool_calls": ["f()"]}), "no name or no arguments"),
    (chat(USER, {"from": "function_call", "value": "{f"}), "a tool call: not valid JSON"),
    (chat(USER, ASSISTANT, tools="[{"), "tools: not valid JSON"),
    (chat(USER, ASSISTANT, tools={"name": "f"}), "tools is not a list of objects"),
    (chat(USER, {**ASSISTANT, "weight": 0}), "no answer of it is to be trained"),
    (chat(USER, {**ASSISTANT, "weight": 0.5}), "the weight 0.5; expected 0 or 1"),
    (chat(USER, {**ASSISTANT, "weight": 1, "train": False}), "says that it is trained, and that it is not (weight, train)"),
    (chat({**USER, "train": True}, ASSISTANT), "asks to be trained; only answers are"),
    (chat(USER, {**ASSISTANT, "images": ["a.png"]}), "a message has images, which would be lost"),
    (chat(USER, ASSISTANT, label=False), "label rates the answer (unpaired preferences): take the good ones with --keep label=true"),
    (chat(USER, ASSISTANT, images=["a.png"]), "column images would be lost"),
    (chat(USER, ASSISTANT, history=[["q", "a"]]), "column history would be lost"),
    (chat(USER, ASSISTANT, prompt="another"), "column prompt would be lost"),
    (chat(USER, ASSISTANT, loss_mask=[0, 1, 1]), "loss_mask is not a list of 0 or 1"),
    ({"instruction": "q", "query": "other", "output": "a"}, "instruction and query hold two questions"),
    ({"instruction": "q", "input": "", "output": "a", "history": 5}, "history is not a list"),
    ({"text": "\n"}, "text is empty"),
]
MALFORMED_DPO = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is empty"),
    ({"prompt": "q", "chosen": None, "rejected": "a"}, "chosen is null"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": [USER, ASSISTANT], "chosen": "a", "rejected": "b"}, "does not end with a user message"),
    ({"prompt": [ASSISTANT, USER], "chosen": "a", "rejected": "b"}, "wrong order of roles: assistant first"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 4, "rejected-rating": 4}, "tied"),
    ({"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, ASSISTANT]}, "differ before their last message"),
    ({"chosen": [USER, USER], "rejected": [USER, ASSISTANT]}, "not the assistant's"),
    ({"chosen": "a", "rejected": "b"}, "without a prompt"),
    ({"chosen": HH + "\n\nHuman: q\n\nAssistant: a", "rejected": HH}, "differ before their last message"),
    ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": HH}, "a message is empty"),
    ({"prompt": "other", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, "prompt disagrees with the messages before the answer"),
    (
        {"prompt": [SYSTEM, OTHER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        "prompt disagrees with the messages before the answer",
    ),
    ({"input": "q", "preferred_output": [ASSISTANT], "non_preferred_output": [OTHER]}, "input has no messages"),
    (
        {"input": {"messages": [USER]}, "preferred_output": [], "non_preferred_output": [OTHER]},
        "preferred_output is not a list of messages",
    ),
]


@pytest.mark.parametrize(("row", "cause"), MALFORMED_SFT)
def test_sft_rows_that_cannot_be_used(row, cause):
    assert cause in str(next(conversations("sft", [row])))


@pytest.mark.parametrize(("row", "cause"), MALFORMED_DPO)
def test_pairs_that_cannot_be_used(row, cause):
    assert cause in str(next(conversations("dpo", [row])))


def test_a_row_of_no_known_shape_is_refused_alone():
    odd = {"prompt": "q"}
    found = list(conversations("sft", [odd, {"prompt": "q", "response": "a"}, odd, {"text": "a document"}]))
    assert [isinstance(item, Refused) for item in found] == [True, False, True, False]
    assert str(found[0]) == str(found[2]) == "its columns are of no known shape: prompt"


def message(name, parent, role, rank, **more):
    return {"message_id": name, "parent_id": parent, "role": role, "text": name, "rank": rank, **more}


def test_a_tree_of_messages_is_its_best_ranked_path():
    rows = [
        message("root", None, "prompter", None),
        message("second", "root", "assistant", 1),
        message("best", "root", "assistant", 0),
        message("gone", "best", "prompter", 0, deleted=True),
        message("unranked", "best", "prompter", None),
        message("asked", "best", "prompter", 1),
        message("alone", None, "prompter", None),
        message("reply", "asked", "assistant", None),
        message("left open", "reply", "prompter", 0),
    ]
    assert [[sent["text"] for sent in path] for path in best_paths(rows)] == [["root", "best", "asked", "reply"], []]
    whole, open_tree = conversations("sft", rows)
    assert whole.messages[1] == {"role": "assistant", "content": "best"}
    assert str(open_tree) == "a tree without an answer"


def test_every_row_of_a_tree_is_accounted_for():
    rows = [
        message("root", None, "prompter", None),
        message("answer", "root", "assistant", 0),
        message("orphan", "nowhere", "assistant", 0),
    ]
    rows += [message("odd", "root", "assistant", "0"), {"parent_id": None, "role": "prompter", "text": "x"}, Refused("not UTF-8")]
    causes = [str(item) for item in conversations("sft", rows) if isinstance(item, Refused)]
    assert len(causes) == 4
    assert sum("whose parent is not there" in cause for cause in causes) == 1
    assert sum("rank is not a number" in cause for cause in causes) == 2
    without_parent = [{"message_id": "a", "role": "assistant", "text": "x"}]
    assert "wrong order of roles" in str(list(conversations("sft", [rows[0], *without_parent]))[1])


def test_nulls_that_arrow_adds_are_not_the_rows(tmp_path):
    calls = [[{"function": {"name": "f", "arguments": arguments}}] for arguments in ({"a": 1}, {"b": 1})]
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": call}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [item.messages[1]["tool_calls"][0]["function"]["arguments"] for item in conversations("sft", file_rows(tmp_path / "a.parquet"))]
    assert read == [{"a": 1}, {"b": 1}]
