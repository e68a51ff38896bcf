"""What an error about rows of no known shape proposes: an option that reads them, as a shell takes it, or what to write otherwise."""

import shlex

import pytest

from data_prep.formats.rows import file_rows
from data_prep.shapes.columns import USUAL, Columns, keep_of, names_of
from data_prep.shapes.conversations import conversations, read_row
from data_prep.shapes.messages import Chat
from posttrain.data.parts import Refused


def advice(kind: str, row: dict) -> str:
    with pytest.raises(ValueError, match="rows have these columns") as error:
        list(conversations(kind, [row]))
    return str(error.value).splitlines()[-1]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"turns": [{"user": "q", "assistant": "a"}]}, "--columns messages=turns"),
        ({"rounds": [{"question": "q", "answer": "a"}]}, "--columns messages=rounds"),
        ({"dialog": [{"role": "user", "text": "q"}, {"role": "bot", "text": "a"}]}, "--columns messages=dialog --content_key text"),
        ({"question": "Where is it?", "answers": ["Paris"]}, "--columns prompt=question,answer=answers"),
        ({"My Question": "What is it then?", "The Answer": "A plum tree."}, "--columns 'prompt=My Question,answer=The Answer'"),
        ({"METADATA": "some words here", "uuid": "a b c", "created_at": "Mon 3 May at 5", "body": "It is a plum. "}, "--columns text=body"),
        ({"metadata": "words about it", "ask_it": "What is it then?", "reply": "A plum"}, "--columns prompt=ask_it,answer=reply"),
    ],
)
def test_the_option_that_is_proposed_reads_the_row(row, line):
    assert advice("sft", row) == f"This would probably read them: {line}"
    _, names, *rest = shlex.split(line)
    columns = Columns(names=names_of(names.split(","), "x"), content_key=rest[-1] if rest else None)
    assert not isinstance(read_row("sft", row, columns), Refused)


@pytest.mark.parametrize(
    ("kind", "row", "line"),
    [
        ("sft", {"translation": {"en": "hi", "de": "hallo"}}, "translation holds objects (en, de): write what is asked and answered into"),
        ("dpo", {"translation": {"en": "hi", "de": "hallo"}}, "translation holds objects (en, de): write what is asked and answered into"),
        ("sft", {"question": "Where?", "answers": {"text": ["x"]}}, "answers holds objects (text): write what is asked and answered into"),
        ("sft", {"question": "Where?", "answers": ["x", "y"]}, "answers holds several answers, of which one can be trained"),
    ],
)
def test_what_no_option_reads_is_said_with_what_to_write(kind, row, line):
    assert advice(kind, row).startswith(line)


def test_one_answer_is_not_sent_from_one_command_to_the_other():
    cause = str(read_row("dpo", {"question": "Where?", "answers": ["Paris"]}, USUAL))
    assert cause.endswith("one answer is for data_prep/prepare_sft.py, with --columns answer=answers")


def test_an_option_in_a_cause_is_written_as_a_shell_takes_it():
    row = {"prompt": "q", "response": "a"}
    assert "--keep 'is correct!=no', or all with --ignore 'is correct'" in str(read_row("sft", row | {"is correct": "no"}, USUAL))
    assert "--columns 'context=my context'" in str(read_row("sft", row | {"my context": "two words"}, USUAL))


@pytest.mark.parametrize("condition", ["label=true", "label=yes", "label=1"])
def test_yes_and_no_are_truth_values_to_keep(condition):
    row = {"prompt": "q", "response": "a"}
    for value, kept in (("yes", True), ("Yes ", True), ("no", False), (True, True), (0, False)):
        assert isinstance(read_row("sft", row | {"label": value}, Columns(keep=(keep_of(condition),))), Chat) is kept


def test_the_line_of_an_error_in_csv_is_that_of_the_file(tmp_path):
    path = tmp_path / "a.csv"
    for text, where in (
        ('\n\nprompt,response\nq,a\nq,"a"b\n', "line 5"),
        ('sep=;\nprompt;response\nq;a\nq;"a"b\n', "line 4"),
        ('prompt,response\nq,a\nq,"a\nb\nc\n', "the row of lines 3 to 5"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{where} is not valid CSV"):
            list(file_rows(path))
