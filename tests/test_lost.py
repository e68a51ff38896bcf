"""What a row has and no reader takes: by its name and its value it refuses the row, with the option that reads it, or it is told."""

import pytest

from data_prep.shapes.columns import USUAL, Columns, keep_of
from data_prep.shapes.conversations import conversations, read_row
from data_prep.shapes.messages import Chat, Document
from data_prep.shapes.names import near
from data_prep.shapes.odd_texts import IN_CHAT_FORM
from posttrain.data.parts import Refused

ROW = {"prompt": "Which tree bears plums?", "response": "The plum tree."}
PAIR = {"prompt": "Which tree bears plums?", "chosen": "The plum tree.", "rejected": "The oak."}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(kind: str, row: dict, columns: Columns = USUAL) -> str:
    """The cause for which a row is refused, or its notes."""
    item = read_row(kind, row, columns)
    return str(item) if isinstance(item, Refused) else "; ".join(item.notes)


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ({"cot": "Plums grow on it."}, "--columns thinking=cot"),
        ({"Rationale": "Plums grow on it."}, "--columns thinking=Rationale"),
        ({"thinking_trajectories": ["One way.", "Another way."]}, "--columns thinking=thinking_trajectories"),
        ({"initialReasonSteps": "Step 1: look."}, "--columns thinking=initialReasonSteps"),
        ({"sys": "You are a gardener."}, "--columns system=sys"),
        ({"persona": "A gardener"}, "--columns system=persona"),
        ({"retrieved_docs": [{"page": "Of plums and trees"}]}, "--columns context=retrieved_docs"),
        ({"previous_turns": ["Hello there", "Good day"]}, "--columns history=previous_turns"),
        ({"opa": "oak", "opb": "plum"}, "--ignore opa,opb"),
        ({"A": "oak", "B": "plum", "C": "ash"}, "--ignore A,B,C"),
        ({"choice_1": "oak"}, "--ignore choice_1"),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_what_belongs_before_an_answer_is_not_left_out_unsaid(kind, more, option):
    row = (ROW if kind == "sft" else PAIR) | more
    cause = read(kind, row)
    assert "would be lost" in cause and option in cause
    left = Columns(ignore=tuple(more))
    assert read(kind, row, left) == ""
    if "--columns" in option and kind == "sft" and all(isinstance(value, str) for value in more.values()):
        what, name = option.split(" ")[1].split("=")
        item = read_row("sft", row, Columns(names={what: name}))
        assert isinstance(item, Chat) and next(iter(more.values())) in str(item.messages)


def test_what_only_speaks_of_such_texts_is_told():
    more = {"context_length": 7, "reasoning_type": "math", "document_title": "Of plums and trees", "persona": "gardener", "hint": ""}
    assert read("sft", ROW | more) == "; ".join(f"column not used: {name}" for name in more if name != "hint")
    assert [near(name) for name in ("grape", "contexts", "LongCoT", "context_id", "e", "answer_b")] == [
        None,
        "context",
        "thinking",
        None,
        "choice",
        "choice",
    ]


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ({"label": "True"}, "--keep label=true"),
        ({"label": 1.0}, "--keep label=true"),
        ({"correct": False}, "--keep correct=true"),
        ({"Verified": "no"}, "--keep Verified=true"),
        ({"kto_tag": "good"}, "--keep kto_tag=VALUE"),
        ({"split": "test"}, "--keep split=train"),
        ({"Split": " validation"}, "--keep Split=train"),
        ({"weight": "0"}, "--keep weight=1"),
        ({"weight": 0.5}, "--keep weight=1"),
    ],
)
def test_a_row_that_is_said_to_be_bad_or_held_out_is_refused_with_the_option_that_takes_the_others(more, option):
    assert option in read("sft", ROW | more)
    (name, value), keep = next(iter(more.items())), keep_of(option.removeprefix("--keep ").replace("VALUE", "good"))
    found = read_row("sft", ROW | more, Columns(keep=(keep,)))
    good = str(value).lower() in ("true", "1.0", "good")
    assert isinstance(found, Chat) if good else isinstance(found, Refused) and name in str(found)
    assert read("sft", ROW | more, Columns(ignore=(name,))) == ""


def test_what_grades_or_belongs_to_held_out_rows_is_used():
    assert (
        read("sft", ROW | {"correctness": 3, "split": "train", "weight": "1.0"}) == "column not used: correctness; column not used: split"
    )
    assert read("sft", ROW | {"split": "test"}, Columns(held_out=True)) == "column not used: split"


def test_all_columns_that_would_be_lost_are_named_at_once():
    row = {"messages": [USER, ASSISTANT], "solution": "s", "answer": "42", "images": ["a.png"]}
    assert read("sft", row) == (
        "columns solution, answer, images would be lost: name what they hold with --columns, or leave them out with --ignore "
        "solution,answer,images"
    )


def test_keys_of_messages_are_left_out_where_the_user_says_so():
    row = {"messages": [USER | {"mood": "glad", "mask": 1}, ASSISTANT | {"reasoning": "t"}]}
    assert "a message has mood, which would be lost: leave it out with --ignore mood" in read("sft", row)
    assert "leave it out with --ignore mask" in read("sft", row, Columns(ignore=("mood",)))
    assert read_row("sft", row, Columns(ignore=("mood", "mask", "reasoning", "content"))) == Chat([USER, ASSISTANT])
    speakers = {"messages": [{"speaker": "x", "text": "q"}]}
    assert (
        read("sft", speakers)
        == "a message does not say who speaks; it has speaker, text: name the keys with --role_key speaker and --content_key text"
    )


def test_one_answer_is_taken_of_a_list_and_several_are_no_pair():
    assert read_row("sft", {"question": "q", "answer": ["a"]}, USUAL) == Chat(
        [USER, ASSISTANT], notes=("answer is a list of one text, which is taken",)
    )
    for answers in (["a", "b"], ["a", "b", "c"]):
        row = {"question": "Who, and when?", "answer": answers}
        cause = f"answer holds {len(answers)} answers, of which one can be trained"
        assert cause in read("sft", row)
        with pytest.raises(ValueError, match="one answer: use data_prep/prepare_sft.py"):
            list(conversations("dpo", [row]))
    with pytest.raises(ValueError, match="preference pairs: use data_prep/prepare_dpo.py"):
        list(conversations("sft", [{"prompt": "q", "output": ["a", "b"]}]))


def test_no_option_is_advised_that_would_train_a_question():
    squad = {"id": "1", "context": "Plums grow on trees.", "question": "Where do plums grow?", "answers": {"text": ["on trees"]}}
    with pytest.raises(ValueError, match="no known shape|these columns") as error:
        list(conversations("sft", [squad]))
    assert "--columns" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"dialog": [{"speaker": "user", "text": "q"}, {"speaker": "bot", "text": "a"}]},
            "messages=dialog --role_key speaker --content_key text",
        ),
        ({"content": "Plums grow on trees. " * 9}, "text=content"),
    ],
)
def test_the_option_that_is_advised_reads_the_rows(row, line):
    with pytest.raises(ValueError, match=f"This would probably read them: --columns {line}"):
        list(conversations("sft", [row]))


def test_pairs_of_other_names_are_advised():
    with pytest.raises(ValueError, match="--columns prompt=ask_for,chosen=reply_w,rejected=reply_l"):
        list(conversations("dpo", [{"ask_for": "Which tree is it?", "reply_w": "The plum tree.", "reply_l": "The oak, I think."}]))


def test_a_chat_written_as_one_text_is_told():
    chats = (
        "### Human: hi\n### Assistant: yo",
        "<s>[INST] hi [/INST] yo",
        "USER: hi ASSISTANT: yo",
        "<|user|>\nhi\n<|assistant|>\nyo",
        "Q: hi\nA: yo",
    )
    for text in chats:
        assert read_row("sft", {"text": text}, USUAL) == Document(text, (IN_CHAT_FORM,)), text
    for text in ("Once upon a time there was a user: me.", "def f(a: int) -> None: ...", "The model: a study.", "Question time: when?"):
        assert read_row("sft", {"text": text}, USUAL) == Document(text), text


def test_a_question_without_an_answer_at_the_end_is_left_out():
    found = read_row("sft", {"messages": [USER, ASSISTANT, USER]}, USUAL)
    assert found == Chat([USER, ASSISTANT], notes=("a last message of the user left out, which has no answer",))
    assert read("sft", {"messages": [USER]}) == "the last message is not the assistant's"


def test_a_transcript_in_a_prompt_is_read_as_its_turns():
    row = {"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant:", "response": "a"}
    assert read_row("sft", row, USUAL) == Chat([USER, ASSISTANT, USER, ASSISTANT])


def test_tools_that_are_described_twice_are_refused():
    row = {"messages": [{"role": "system", "content": "s <tools>[]</tools>"}, USER, ASSISTANT], "tools": [{"name": "f"}]}
    assert "the system message describes tools, and so does tools" in read("sft", row)
    assert read("sft", row, Columns(ignore=("tools",))) == ""
