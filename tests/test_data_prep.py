"""Preparation: every row shape is read, every refused row is counted under its cause, nothing half-written is left."""

import gzip
import json

import pytest

from data_prep import prepare_dpo, prepare_sft
from data_prep.prepare import prepare
from data_prep.sources import DPO_HUB, SFT_HUB, Pair, Refused, best_paths, dpo_reader, read_rows, sft_reader
from posttrain import data

USER, ASSISTANT, SYSTEM = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("system", "s")))

OTHER, HH = {"role": "assistant", "content": "b"}, "\n\nHuman: q\n\nAssistant: a"


def sft(tiny, tmp_path, rows: list[dict], *more: str) -> dict:
    """Prepare rows and return the manifest."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "--source",
        f"{tmp_path}/rows.jsonl",
        "--tokenizer",
        tiny.base,
        "--output_dir",
        f"{tmp_path}/out",
        "--val_size",
        "0",
        *more,
    ]
    prepare("sft", SFT_HUB, sft_reader, prepare_sft.encode, arguments)
    return json.loads((tmp_path / "out" / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, [USER, ASSISTANT]),
        ({"instruction": "q", "input": "more", "output": "a"}, [{"role": "user", "content": "q\n\nmore"}, ASSISTANT]),
        ({"instruction": "q", "context": "more", "response": "a"}, [{"role": "user", "content": "q\n\nmore"}, ASSISTANT]),
        ({"prompt": "q", "response": "a"}, [USER, ASSISTANT]),
        ({"question": "q", "answer": "a"}, [USER, ASSISTANT]),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [SYSTEM, USER, ASSISTANT],
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, [SYSTEM, USER, ASSISTANT]),
        ({"text": "a document"}, {"text": "a document"}),
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
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "b"}]}, Pair([USER], "a", "b")),
        ({"prompt": "q", "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "b"}]}, Pair([USER], "a", "b")),
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


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is empty"),
        ({"prompt": "q", "chosen": None, "rejected": "a"}, "not a list of messages"),
        ({"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, ASSISTANT]}, "differ before their last message"),
        ({"chosen": [USER, USER], "rejected": [USER, ASSISTANT]}, "not the assistant's"),
        ({"chosen": "a", "rejected": "b"}, "without a prompt"),
        ({"chosen": HH + "\n\nHuman: q\n\nAssistant: a", "rejected": HH}, "differ before their last message"),
        ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": HH}, "a message is empty"),
        ({"chosen": [USER, {"role": ["assistant"], "content": "a"}], "rejected": [USER, ASSISTANT]}, "unknown role"),
    ],
)
def test_pairs_that_cannot_be_used(row, cause):
    with pytest.raises(Refused, match=cause):
        dpo_reader(set(row))(row)


def test_a_tree_of_messages_is_its_best_ranked_path():
    def message(name, parent, role, rank, **more):
        return {"message_id": name, "parent_id": parent, "role": role, "text": name, "rank": rank, **more}

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
    texts = [[sent["content"] for sent in row["messages"]] for row in best_paths(rows)]
    assert texts == [["root", "best", "asked", "reply"], []]
    assert sft_reader({"messages"})(next(best_paths(rows)))[1] == {"role": "assistant", "content": "best"}


def test_unknown_columns_are_named_with_what_is_expected():
    with pytest.raises(ValueError, match=r"\['body', 'title'\]; expected messages, conversations"):
        sft_reader({"title", "body"})
    with pytest.raises(ValueError, match="expected chosen and rejected"):
        dpo_reader({"prompt", "response"})


def test_every_refused_row_is_counted_under_its_cause(tiny, tmp_path):
    rows = [{"prompt": "ta", "response": "ke"}, {"prompt": "ta", "response": " "}, {"prompt": "ta", "response": "ke " * 300}]
    rows += [{"prompt": "ta", "response": None}, {"prompt": "ta"}]
    manifest = sft(tiny, tmp_path, rows, "--max_length", "100")
    assert manifest["counts"] == {"train": 1, "validation": 0}
    assert manifest["ledger"] == {
        "response is empty": 1,
        "longer than --max_length 100": 1,
        "response is not text": 1,
        "column 'response' is missing": 1,
    }
    assert manifest["ledger_examples"]["response is empty"] == "rows.jsonl:1"


def test_a_system_prompt_fills_in_where_there_is_none(tiny, tmp_path):
    sft(tiny, tmp_path, [{"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}], "--system_prompt", "ta")
    rows = data.load(str(tmp_path / "out"), "sft", "").train.table
    texts = [tiny.tokenizer.decode(row["input_ids"]) for row in rows]
    assert texts[0].startswith("<|im_start|>system\ns<|im_end|>")
    assert texts[1].startswith("<|im_start|>system\nta<|im_end|>")


def test_a_system_prompt_has_no_place_in_documents(tiny, tmp_path):
    with pytest.raises(ValueError, match="no place in plain documents"):
        sft(tiny, tmp_path, [{"text": "ta ke"}], "--system_prompt", "ta")


def test_validation_shares_no_prompt_with_training(tiny, tmp_path):
    rows = [{"prompt": f"ta {number % 10}", "response": f"ke {number}"} for number in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ["--source", f"{tmp_path}/rows.json", "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out", "--val_size", "9"]
    prepare("sft", SFT_HUB, sft_reader, prepare_sft.encode, arguments)
    loaded = data.load(str(tmp_path / "out"), "sft", "")
    assert (len(loaded.train), len(loaded.validation)) == (32, 8)
    numbers = [{int(row["source"].split(":")[1]) % 10 for row in split.table} for split in (loaded.train, loaded.validation)]
    assert not numbers[0] & numbers[1]


def test_a_source_that_gives_nothing_leaves_nothing(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"no row of rows.jsonl can be trained on: 1 x response is empty"):
        sft(tiny, tmp_path, [{"prompt": "ta", "response": ""}])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(FileNotFoundError, match="expected a JSON"):
        list(read_rows(str(tmp_path / "nowhere"), None, "train"))


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    rows = [{"prompt": "é", "response": "a"}, {"prompt": "q", "response": "b"}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n" + lines + "\n\n")
    (tmp_path / "a.csv").write_text("prompt,response\né,a\nq,b\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    for name in ("a.json", "a.jsonl", "a.csv", "a.jsonl.gz"):
        assert list(read_rows(str(tmp_path / name), None, "train")) == rows, name


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": 1}\n{"a": ', "line 2 is not valid JSON"), ('[{"a": 1}, ', "not valid JSON"), ("[1]", "row 1 is a int")],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(str(tmp_path / "a.jsonl"), None, "train"))
    assert "a.jsonl" in str(error.value)


def test_a_cut_or_foreign_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"prompt": "q"}).encode() * 999)[:60])
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    (tmp_path / "c.csv").write_text('a,b\n1,2\n3,4,5,"\n')
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    for name in ("a.jsonl.gz", "b.jsonl", "c.csv", "d.parquet"):
        with pytest.raises(ValueError, match=f"{name} cannot be read to its end"):
            list(read_rows(str(tmp_path / name), None, "train"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"notes.txt: expected a JSON"):
        list(read_rows(str(tmp_path / "notes.txt"), None, "train"))


def test_pairs_are_prompt_and_two_answers_that_end(tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "ta", "chosen": "ke", "rejected": "lo ni"}))
    arguments = ["--source", f"{tmp_path}/pairs.jsonl", "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out"]
    prepare("dpo", DPO_HUB, dpo_reader, prepare_dpo.encode, arguments)
    row = data.load(str(tmp_path / "out"), "dpo", "").train.table[0]
    texts = [tiny.tokenizer.decode(row[name]) for name in ("prompt", "chosen", "rejected")]
    assert texts == ["<|im_start|>user\nta<|im_end|>\n<|im_start|>assistant\n", "ke<|im_end|>", "lo ni<|im_end|>"]
