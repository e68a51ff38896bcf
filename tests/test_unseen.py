"""A name that the user gives and that no row has is refused, with the nearest that is there; one that a single row has is not."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.options import look, parse
from data_prep.prepare import prepare
from data_prep.unseen import refuse_unseen

TURNS = [{"who": "Narrator", "said": "q"}, {"who": "hero", "said": "a"}]
ROWS = [{"ask": "q", "reply": "a"}] * 3 + [
    {"talk": TURNS, "label": True},
    {"talk": json.dumps([*TURNS, {"who": "fool", "name": "Bob"}]), "notes": None},
]
TREE = [{"message_id": "a", "parent_id": None, "role": "asker", "text": "q"}]


def refuse(folder, files: dict[str, list[dict]], *more: str) -> None:
    """Look for the names of a command line in the rows of some files."""
    for name, rows in files.items():
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        else:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [word for name in files for word in ("--dataset", str(folder / name))]
    sources = look("sft", parse("sft", [*given, "--tokenizer", "x", "--output_dir", str(folder / "out"), *more]))
    refuse_unseen([*sources.training, *sources.held_out])


KEYS = "Seen are ask, reply, talk, label, who, said, notes, name"
COLUMNS = "Seen are ask, reply, talk, label, notes"
MISSPELT = [
    (
        ("--columns", "prompt=aks,answer=reply"),
        f"--columns prompt=aks: no row of rows.jsonl has the column aks. Did you mean ask? {COLUMNS}",
    ),
    (("--columns", "prompt=ASK"), f"--columns prompt=ASK: no row of rows.jsonl has the column ASK. Did you mean ask? {COLUMNS}"),
    (("--ignore", "notes,lable"), f"--ignore lable: no row of rows.jsonl has the column or key lable. Did you mean label? {KEYS}"),
    (("--keep", "xyz=true"), f"--keep xyz=true: no row of rows.jsonl has the column xyz. {COLUMNS}"),
    (("--role_key", "wo"), "--role_key wo: no message of rows.jsonl has the key wo. Did you mean who? Seen are who, said, name"),
    (("--content_key", "sad"), "--content_key sad: no message of rows.jsonl has the key sad. Did you mean said? Seen are who, said, name"),
    (
        ("--role_key", "who", "--roles", "fool=assistant,hreo=user"),
        "--roles hreo=user: no message of rows.jsonl has the role hreo. Did you mean hero? Seen are narrator, hero, fool",
    ),
    (
        ("--role_key", "who", "--train_on", "assistant,hero,bod,bob"),
        "--train_on assistant,hero,bod,bob: no message of rows.jsonl has the role or name bod. Did you mean bob? "
        "Seen are narrator, hero, fool, bob",
    ),
    (("--roles", "hero=user"), "--roles hero=user: no message of rows.jsonl has the role hero. None was seen"),
]


@pytest.mark.parametrize(("options", "expected"), MISSPELT)
def test_a_name_that_no_row_has_is_refused_with_the_nearest(tmp_path, options, expected):
    with pytest.raises(ValueError) as error:
        refuse(tmp_path, {"rows.jsonl": ROWS}, *options)
    assert str(error.value) == expected


def test_a_name_that_one_row_has_is_taken_wherever_it_stands(tmp_path):
    options = ("--columns", "prompt=ask,messages=talk", "--ignore", "notes", "--keep", "label=true", "--role_key", "who")
    more = ("--content_key", "said", "--roles", "narrator=user,HERO=assistant,fool=assistant")
    refuse(tmp_path, {"rows.jsonl": ROWS}, *options, *more)
    refuse(tmp_path, {"other.jsonl": [{"prompt": "q", "response": "a"}], "rows.jsonl": ROWS}, *options)  # of two files, one has them
    refuse(tmp_path, {"rows.parquet": [{"notes": None, "text": "a"}]}, "--ignore", "notes")
    refuse(tmp_path, {"tree.jsonl": TREE}, "--roles", "asker=user")


def test_a_file_beside_the_rows_speaks_of_these_rows_alone(tmp_path):
    (tmp_path / "rows.jsonl.columns.yaml").write_text("columns: {prompt: ask}\nignore: [score]\n")
    with pytest.raises(ValueError, match="--ignore score: no row of rows.jsonl has the column or key score"):
        refuse(tmp_path, {"rows.jsonl": ROWS, "other.jsonl": [{"prompt": "q", "response": "a", "score": 1}]})


def test_it_is_refused_before_anything_is_encoded_and_by_the_same_command_again(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"ta {n}", "response": "ke", "n": n}) + "\n" for n in range(9)))
    common = ["--source", f"{tmp_path}/rows.jsonl", "--tokenizer", tiny.base, "--output_dir", f"{tmp_path}/out"]
    for _ in range(2):
        with pytest.raises(ValueError, match="--ignore m: no row"):
            prepare("sft", [*common, "--ignore", "m"])
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    prepare("sft", [*common, "--ignore", "n"])
