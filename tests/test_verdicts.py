"""What says of a row or of a message that it is bad, held out or rated: it is refused with the option that takes the others."""

import shlex

import pytest

from data_prep.shapes.columns import USUAL, Columns, keep_of
from data_prep.shapes.conversations import read_row
from data_prep.shapes.messages import Chat
from posttrain.data.parts import Refused

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROW, PAIR = {"prompt": "q", "response": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}
ANSWER = {
    **dict.fromkeys(("is_safe", "Success", "answer_correct", "isVerified"), (False, True, "=true")),
    **dict.fromkeys(("correct", "passed"), (0, 1, "!=0")),
    "verified": ("N", "Y", "!=N"),
    "quality": ("bad", "good", "!=bad"),
    "status": ("rejected", "approved", "!=rejected"),
    "user_feedback": ("negative", "positive", "!=negative"),
    "thumbs": ("down", "up", "!=down"),
    "correctness": ("incorrect", "0", "!=incorrect"),
}
OF_ROWS = {
    **dict.fromkeys(("is_train", "use_for_training"), (False, True, "=true")),
    **dict.fromkeys(("toxic", "is_duplicate", "has_error", "flagged", "excluded", "is_test", "held_out"), (True, False, "=false")),
    "harmful": (1, 0, "!=1"),
    **dict.fromkeys(("partition", "data_split", "fold", "subset", "set"), ("test", "train", "=train")),
    "Split": ("my-dev", "train", "=train"),
    **dict.fromkeys(("weight", "sample_weight", "loss_weight"), (0.5, 1, "=1")),
}


@pytest.mark.parametrize("name", [*ANSWER, *OF_ROWS])
@pytest.mark.parametrize(
    "row", [ROW, PAIR, {"messages": [USER, ASSISTANT]}, {"text": "a text"}], ids=["exchange", "pair", "messages", "text"]
)
def test_a_row_that_says_that_it_is_not_to_be_trained_is_refused(row, name):
    kind = "dpo" if row is PAIR else "sft"
    if kind == "dpo" and name in ANSWER:
        return  # of which answer it speaks is not said
    bad, good, option = (ANSWER | OF_ROWS)[name]
    cause = str(read_row(kind, row | {name: bad}, USUAL))
    assert f"--keep {shlex.quote(name + option)}" in cause and f"--ignore {name}" in cause, cause
    keep = Columns(keep=(keep_of(name + option),))
    assert isinstance(read_row(kind, row | {name: bad}, keep), Refused)
    for columns in (keep, Columns(ignore=(name,))):
        assert not isinstance(read_row(kind, row | {name: good}, columns), Refused)
    assert not isinstance(read_row(kind, row | {name: bad}, Columns(ignore=(name,))), Refused)
    assert not isinstance(read_row(kind, row | {name: good}, USUAL), Refused)


@pytest.mark.parametrize("more", [{"fold": 1}, {"subset": "gsm8k_test"}, {"test": 1}, {"quality": 0}, {"toxic_type": "bad"}, {"errors": 1}])
def test_what_only_sounds_so_is_told(more):
    assert read_row("sft", ROW | more, USUAL).notes == (f"column not used: {next(iter(more))}",)


def test_what_speaks_of_one_answer_of_a_pair_says_nothing_of_the_row():
    for name in ("rejected_toxic", "chosen_skip", "is_response_b_unsafe"):
        assert read_row("dpo", PAIR | {name: True}, USUAL).notes == (f"column not used: {name}",)


def test_a_held_out_row_is_read_where_those_are_asked_for():
    for more in ({"data_split": "test"}, {"is_test": True}, {"held_out": "yes"}):
        assert isinstance(read_row("sft", ROW | more, Columns(held_out=True)), Chat)


@pytest.mark.parametrize(
    "more", [{"rating": 1}, {"score": 0.2}, {"thumbs_up": False}, {"upvoted": True}, {"votes": 3}, {"is_good": 0}, {"toxic": True}]
)
def test_a_message_that_is_rated_is_refused(more):
    (name,) = more
    row = {"messages": [USER, ASSISTANT | more]}
    cause = f"a message has {name}, which rates it: write weight, 0 or 1, by what it says, or leave it out with --ignore {name}"
    assert str(read_row("sft", row, USUAL)) == cause
    assert read_row("sft", row, Columns(ignore=(name,))) == Chat([USER, ASSISTANT])
    pair = {"prompt": "q", "chosen": [ASSISTANT | more], "rejected": [ASSISTANT | {"content": "b"}]}
    assert str(read_row("dpo", pair, USUAL)) == cause


SWITCHES = ("low", "High", "none", "auto", "enabled", "disabled", "medium", "max", "minimal", "/think", "no_think", True, 2048)


@pytest.mark.parametrize("value", [*SWITCHES, {"type": "enabled", "budget_tokens": 2048}])
def test_how_much_is_thought_is_no_thinking(value):
    for name in ("reasoning", "thinking", "reasoning_effort"):
        for kind, row in (("sft", ROW), ("dpo", PAIR)):
            assert read_row(kind, row | {name: value}, USUAL).notes == (f"column not used: {name}",)
        message = read_row("sft", {"messages": [USER, ASSISTANT | {name: value}]}, USUAL)
        assert message == Chat([USER, ASSISTANT], notes=(f"key of messages not used: {name}",))


def test_thinking_as_parts_is_read():
    found = read_row("sft", ROW | {"thinking": [{"type": "thinking", "thinking": "t", "signature": "x"}]}, USUAL)
    assert found == Chat([USER, ASSISTANT | {"reasoning_content": "t"}])


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"available_tools": [{"name": "f"}]}, "tools"),
        ({"function_definitions": '[{"name": "f"}]'}, "tools"),
        ({"toolSchemas": {"name": "f"}}, "tools"),
        ({"search_results": ["Plums are red."]}, "context"),
        ({"ctxs": [{"text": "Plums are red."}]}, "context"),
        ({"few_shot": "Q: plum? A: red."}, "context"),
        ({"instructions": "Be brief, please."}, "system"),
    ],
)
def test_what_stands_before_an_answer_is_not_left_out_unsaid(more, what):
    (name,) = more
    for kind, row in (("sft", ROW), ("dpo", PAIR)):
        assert f"column {name} would be lost: name what it holds with --columns {what}={name}" in str(read_row(kind, row | more, USUAL))
