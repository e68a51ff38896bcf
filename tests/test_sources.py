"""Rows and files: every shape is read, every malformed row is refused under its cause, every damaged file is named."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from bases import parquet

from data_prep.conversations import best_paths, conversations, sft_reader
from data_prep.files import file_rows
from data_prep.messages import Chat, Document, Pair
from data_prep.pairs import dpo_reader
from data_prep.sources import find_files
from posttrain.data.parts import Refused

ROOT = Path(__file__).resolve().parents[1]
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
    assert sft_reader(set(row))(row) == expected


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
    assert dpo_reader(set(row))(row) == expected


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
    ({"messages": None}, "messages is not a list of messages"),
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
    (chat(USER, {**ASSISTANT, "weight": 0}), "says that it is not to be trained"),
    (chat(USER, {**ASSISTANT, "train": False}), "says that it is not to be trained"),
    (chat(USER, {**ASSISTANT, "reasoning_content": "hm"}), "reasoning_content, which would be lost"),
    ({"instruction": "q", "input": "", "output": "a", "history": 5}, "history is not a list"),
    ({"text": "\n"}, "text is empty"),
]
MALFORMED_DPO = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is empty"),
    ({"prompt": "q", "chosen": None, "rejected": "a"}, "not a list of messages"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt is not a list of messages"),
    ({"prompt": [USER, ASSISTANT], "chosen": "a", "rejected": "b"}, "does not end with a user message"),
    ({"prompt": [ASSISTANT, USER], "chosen": "a", "rejected": "b"}, "wrong order of roles: assistant first"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 4, "rejected-rating": 4}, "tied"),
    ({"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, ASSISTANT]}, "differ before their last message"),
    ({"chosen": [USER, USER], "rejected": [USER, ASSISTANT]}, "not the assistant's"),
    ({"chosen": "a", "rejected": "b"}, "without a prompt"),
    ({"chosen": HH + "\n\nHuman: q\n\nAssistant: a", "rejected": HH}, "differ before their last message"),
    ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": HH}, "a message is empty"),
    ({"prompt": "other", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, "prompt disagrees with the messages"),
    ({"prompt": [SYSTEM, OTHER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, "prompt disagrees with the messages"),
    ({"input": "q", "preferred_output": [ASSISTANT], "non_preferred_output": [OTHER]}, "input has no messages"),
    ({"input": {"messages": [USER]}, "preferred_output": [], "non_preferred_output": [OTHER]}, "chosen is not a list of messages"),
]


@pytest.mark.parametrize(("row", "cause"), MALFORMED_SFT)
def test_sft_rows_that_cannot_be_used(row, cause):
    assert cause in str(next(conversations("sft", [row])))


@pytest.mark.parametrize(("row", "cause"), MALFORMED_DPO)
def test_pairs_that_cannot_be_used(row, cause):
    assert cause in str(next(conversations("dpo", [row])))


def test_a_row_without_the_columns_of_the_first_is_refused_alone():
    found = list(conversations("sft", [{"prompt": "q", "response": "a"}, {"prompt": "q"}, {"prompt": "q", "response": "a"}]))
    assert [isinstance(item, Refused) for item in found] == [False, True, False]
    assert str(found[1]) == "column 'response' is missing; the first row has prompt, response"


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


def test_unknown_columns_are_named_with_what_is_expected():
    with pytest.raises(ValueError, match="columns body, title; expected messages, conversations"):
        sft_reader({"title", "body"})
    with pytest.raises(ValueError, match="preference pairs: use data_prep/prepare_dpo.py"):
        sft_reader({"chosen", "rejected"})
    with pytest.raises(ValueError, match="use data_prep/prepare_sft.py"):
        dpo_reader({"prompt", "response"})


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    rows = [{"prompt": "é", "response": "a"}, {"prompt": "q", "response": "b"}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "indented.json").write_text("\n" + json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl").write_text("\n" + lines + "\n\n")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.csv").write_text("prompt,response\né,a\nq,b\n")
    (tmp_path / "blank.csv").write_text("\n\nprompt,response\né,a\nq,b\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert list(file_rows(path)) == rows, path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.jsonl", b'{"a": 1}\n{"a": ', "line 2 is not valid JSON.*no line end, so the file may be cut"),
        ("cut.json", b'[{"a": 1}, ', "not valid JSON"),
        ("numbers.json", b"[1]", "row 1 is a int; expected an object"),
        ("numbers.jsonl", b'{"a": 1}\n7\n', "line 2 is a int; expected an object"),
        ("latin.json", b'[{"a": "\xff"}]', "not UTF-8 at byte 8"),
        ("utf16.jsonl", '{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
        ("number.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", "line 1 is not valid JSON"),
        ("deep.json", b"[" * 100_000, "not valid JSON"),
        ("cut.csv", b'a,b\n1,2\n3,"4', "not valid CSV"),
        ("twice.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999, mtime=0)[:40], "is it whole"),
        ("text.jsonl.gz", b"hello", "is it whole"),
        ("cut.parquet", b"PAR1", "is it whole"),
        ("utf32.jsonl", '{"a": 1}\n'.encode("utf-32"), "is UTF-32"),
        ("packed.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "is gzipped; let its name end with .gz"),
        ("packed.csv", gzip.compress(b"a\n1\n", mtime=0), "is gzipped; let its name end with .gz"),
        ("list.json", b'[\n{"a": 1}\n{"a": 2}]', "row 1 is not valid JSON: a comma should follow it"),
        ("inside.json", b'[\n{"a": 1},\n{"a" 2}, {}]', "row 2 is not valid JSON: Expecting ':' delimiter in line 3"),
        ("after.json", b'[{"a": 1}] {}', "something follows after the list's end"),
        ("comma.json", b'[{"a": 1}, ]', "row 2 is not valid JSON"),
        ("unended.json", b'[{"a": 1} ', "the list does not end, so the file may be cut"),
        ("date.parquet", parquet(a=["x"], d=pyarrow.array([2**30], pyarrow.date32())), "the column d, of the type date32.* cannot be read"),
        ("zone.parquet", parquet(d=pyarrow.array([5], pyarrow.timestamp("ns", tz="Nowhere/X"))), "the column d, .*Nowhere/X"),
        ("latin.parquet", parquet(a=pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())), "the column a, .*UnicodeDecode"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        list(file_rows(tmp_path / name))
    assert name in str(error.value)


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path):
    columns = [pyarrow.array([text]) for text in "abc"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "response", "response"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: two columns have the same name: \['prompt', 'response', 'response'\]"):
        list(file_rows(tmp_path / "a.parquet"))


def test_a_list_is_read_in_blocks_and_no_cut_is_missed(tmp_path, monkeypatch):
    rows = [{"é\U0001f642\\": '\u2028\n\t"', "n": [True, None, -1.5e-7, float("-inf")]}, {}, {"a": {"b": ["x" * 99]}}]
    path, content = tmp_path / "list.json", json.dumps(rows, indent=1, ensure_ascii=False).encode()
    for size in (1, 3, 50):
        monkeypatch.setattr("data_prep.files.BLOCK", size)
        path.write_bytes(content + b"\n ")
        assert list(file_rows(path)) == rows
    for end in range(1, len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"list.json(: row \d is not valid JSON| is not UTF-8 at byte)"):
            list(file_rows(path))


def test_rows_that_cannot_be_decoded_are_counted_not_fatal(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n{"a": "y"}\n')
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n\xff,2\n1,2,3\n")
    assert [str(row) for row in file_rows(tmp_path / "a.jsonl")] == ["{'a': 'x'}", "not UTF-8", "{'a': 'y'}"]
    assert [str(row) for row in file_rows(tmp_path / "a.csv")][1:] == ["not UTF-8", "more fields than the header has columns"]


def test_an_empty_file_has_no_rows(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv"):
        (tmp_path / name).write_text("")
        assert list(file_rows(tmp_path / name)) == []


def test_a_folders_test_files_are_held_out(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "validation-00000.parquet", "testimonials.jsonl", "README.md"):
        (tmp_path / name).touch()
    training, held_out = ([path.name for path in files] for files in find_files(str(tmp_path)))
    assert (training, held_out) == (["testimonials.jsonl", "train.jsonl"], ["test.jsonl", "validation-00000.parquet"])
    for name in ("parts/train", "parts/test"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0000.jsonl").touch()
    training, held_out = ([path.name for path in files] for files in find_files(str(tmp_path / "parts")))
    assert (training, held_out) == (["0000.jsonl"], ["0000.jsonl"])
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "test.jsonl").touch()
    assert [[path.name for path in files] for files in find_files(str(tmp_path / "only"))] == [["test.jsonl"], []]


def test_a_source_that_is_not_there_says_what_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected a JSON"):
        find_files(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("hello")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(FileNotFoundError, match=r"pipe.jsonl is a pipe or a device; expected a JSON"):
        find_files(str(tmp_path / "pipe.jsonl"))
    (tmp_path / "pipe.jsonl").unlink()
    for place, seen in ((tmp_path, "holds notes.txt; expected"), (tmp_path / "notes.txt", "expected a JSON")):
        with pytest.raises(FileNotFoundError, match=seen):
            find_files(str(place))


@pytest.mark.slow
def test_a_hub_that_is_out_of_reach_is_one_message(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    arguments = ["--dataset", "alpaca", "--tokenizer", str(ROOT / "launch/quickstart/base"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "data_prep/prepare_sft.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "tatsu-lab/alpaca (train) cannot be loaded from the local cache, and the hub cannot be reached" in done.stderr
    assert "give the same rows with --source" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
