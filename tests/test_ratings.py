"""What a row says about which of its answers is the better one, under whatever name: it agrees with the order, or the row is refused."""

import pytest

from data_prep.shapes.columns import USUAL, Columns
from data_prep.shapes.conversations import read_row
from data_prep.shapes.messages import Pair
from posttrain.data.parts import Refused

USER = {"role": "user", "content": "q"}
PAIR, CHOSEN = Pair([USER], "a", "b"), {"prompt": "q", "chosen": "a", "rejected": "b"}
TWO, SEVERAL = {"prompt": "q", "response_a": "b", "response_b": "a"}, {"prompt": "q", "responses": ["c", "a", "b"]}


def cause(row: dict, columns: Columns = USUAL) -> str:
    item = read_row("dpo", row, columns)
    return str(item) if isinstance(item, Refused) else "; ".join(item.notes)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"scoreChosen": 1, "scoreRejected": "4"}, "scoreChosen is below scoreRejected"),
        ({"w_score": 1, "l_score": 5}, "w_score is below l_score"),
        ({"winning_rank": 2, "losing_rank": 1}, "winning_rank is above losing_rank"),
        ({"positive_reward": 0, "negative_reward": 0.0}, "tied: positive_reward equals negative_reward"),
        ({"scores": {"chosen": 1, "rejected": 5}}, "scores.chosen is below scores.rejected"),
        ({"chosen_annotations": {"score": 1}, "rejected_annotations": '{"score": 5}'}, "chosen_annotations.score is below"),
        ({"scores": {"chosen": 5, "rejected": 5.0}}, "tied: scores.chosen equals scores.rejected"),
        ({"metadata": {"score_chosen": 1, "score_rejected": 5}}, "metadata.score_chosen is below metadata.score_rejected"),
        ({"scores": [4, 4.0]}, "tied: both answers are rated the same"),
        ({"chosen_correct": False, "rejected_correct": True}, "chosen_correct is below rejected_correct"),
        ({"is_chosen_better": False}, "is_chosen_better is False: the chosen answer would not be the better one"),
        ({"chosen_preferred": "no"}, "chosen_preferred is False: the chosen answer would not be the better one"),
        ({"rejected_is_better": 1}, "rejected_is_better is True: the chosen answer would not be the better one"),
        ({"preference_strength": "0"}, "tied: preference_strength is 0"),
        ({"preferred": "rejected"}, "preferred is rejected"),
        *(({"winner": place}, "nothing says whether that is the chosen answer") for place in ("model_b", "B", 0, 1.0, "response 2", True)),
        ({"gpt_preference": "A"}, "gpt_preference is A, and nothing says whether that is the chosen answer"),
        ({"preference": "draw"}, "tied: preference is draw"),
    ],
)
def test_what_contradicts_chosen_and_rejected_refuses_the_pair(more, why):
    assert why in cause(CHOSEN | more)
    assert read_row("dpo", CHOSEN | more, Columns(ignore=tuple(more))) == PAIR


def test_equal_ratings_in_an_object_that_is_no_rating_are_told():
    item = read_row("dpo", CHOSEN | {"metadata": {"score_chosen": 4, "score_rejected": "4.0"}}, USUAL)
    assert item._replace(notes=()) == PAIR
    assert "metadata.score_chosen equals metadata.score_rejected, which is told only: the row's own order stands" in item.notes


def test_ratings_are_compared_beside_every_shape_whose_order_is_said():
    for row in (
        {"prompt": "q", "response_j": "a", "response_k": "b"},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"instruction": "q", "output": ["a", "b"]},
        {"trajectory": [{"from": "user", "value": "q"}], "chosen": "a", "rejected": "b"},
    ):
        assert cause(row | {"chosen_score": 1, "rejected_score": 2}) == "chosen_score is below rejected_score"
        assert cause(row | {"chosen_score": 2, "rejected_score": 1}) == ""


@pytest.mark.parametrize(
    "more",
    [
        {"chosen_correct": True, "rejected_correct": False, "winner": "chosen", "is_chosen_better": True, "preference_strength": -2},
        {"chosen_logps": -5, "rejected_logps": -2, "chosen_tokens": 1, "rejected_tokens": 2, "status": "1", "preference": 0.7},
        {"chosen_quality": "low", "rejected_quality": "high", "rating_a": 1, "rating_b": 2, "scores": [1, 2], "votes": None},
    ],
)
def test_what_says_nothing_against_the_order_is_told_at_most(more):
    item = read_row("dpo", CHOSEN | more, USUAL)
    assert item._replace(notes=()) == PAIR and all(note.startswith("column not used: ") for note in item.notes)


def test_numbers_that_would_say_the_contrary_are_told():
    note = "chosen_helpfulness is below rejected_helpfulness, which decides nothing: it is no rating by its name"
    assert note in cause(CHOSEN | {"chosen_helpfulness": 1, "rejected_helpfulness": 4})


@pytest.mark.parametrize(
    "more",
    [
        {"is_a_better": False},
        {"is_b_better": "yes", "winner": "B"},
        {"a_score": 1, "b_score": "2"},
        {"response_a_rank": 2, "response_b_rank": 1},
        {"score_response_a": 1, "score_response_b": 2, "verdict": "harmless"},
        {"label_a": 0, "label_b": 1},
        {"preference": "Response B"},
    ],
)
def test_the_better_of_two_answers_is_found_by_any_such_name(more):
    assert read_row("dpo", TWO | more, USUAL)._replace(notes=()) == PAIR


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (TWO | {"winner": "B", "score_a": 5, "score_b": 1}, "score_a and winner contradict each other"),
        (TWO | {"winner": "tie", "score_a": 5, "score_b": 1}, "tied: winner prefers none"),
        (TWO | {"winner": 0}, "winner is 0; expected a or b"),
        (SEVERAL | {"scores": [1, 3, 2], "ranks": [1, 3, 2]}, "scores and ranks of responses contradict each other"),
        ({"prompt": "q", "answers": [{"text": "a", "score": 3, "rank": 2}, {"text": "b", "score": 1, "rank": 1}]}, "rank and score of"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "response_3": "c", "winner": 1}, "are 3 answers, without a score or a rank"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "response_3": "c", **{f"score_{n}": 1 for n in (1, 2, 3)}}, "tied: all of"),
        (CHOSEN | {"chosen": ["a", "c"]}, "chosen holds 2 texts, of which one can be trained"),
    ],
)
def test_answers_of_which_the_better_one_is_not_sure_are_refused(row, why):
    assert why in cause(row)


@pytest.mark.parametrize(
    "row",
    [
        SEVERAL | {"labels": [0.5, 1, 0], "scores": [2, 3, 1]},
        {"prompt": "q", "responses": ["b", "a"], "labels": [False, True]},
        {"prompt": "q", "response_1": "c", "response_2": "b", "response_3": "a", "score_1": 2, "score_2": 1, "score_3": 3},
        {"prompt": "q", "answer_a": "c", "answer_b": "a", "answer_c": "b", "rank_a": 2, "rank_b": 1, "rank_c": 3},
        {"prompt": "q", "answers": [{"text": "a", "score": 3}, {"text": "c"}, {"text": "b", "score": 1}]},
        CHOSEN | {"chosen": ["a"], "rejected": ["b"]},
    ],
)
def test_of_several_answers_the_best_is_beside_the_worst(row):
    assert read_row("dpo", row, USUAL)._replace(notes=()) == PAIR
