"""Which of two answers is the better one: read from a verdict or from scores, and refused where they say none, or the contrary."""

import pytest

from data_prep.shapes.columns import USUAL
from data_prep.shapes.conversations import read_row
from data_prep.shapes.messages import Pair
from posttrain.data.parts import Refused

USER, GOOD, BAD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = Pair([USER], "a", "b")
CHOSEN = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 0},  # PKU-SafeRLHF
        {"question": {"full_text": "q"}, "answer_0": "b", "answer_1": "a", "score_0": -1.0, "score_1": 1.0},  # WebGPT
        {"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"},  # the arena's conversations
        {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2},  # HelpSteer2
        {"prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": "2"},
        {"context": [USER], "response1": "a", "response2": "b", "overall_preference": "-1"},  # HelpSteer3 from a CSV file
        {"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": "0"},  # SHP
        {"prompt": "q", "output_1": "a", "output_2": "b", "preference": 1},
        {"prompt": "q", "completion_a": "b", "completion_b": "a", "winner": "B"},
        {"prompt": "q", "answer1": "b", "answer2": "a", "reward1": 0.1, "reward2": "0.2"},
        {"prompt": "q", "responses": ["c", "b", "a"], "scores": [2, 1, 3]},
        {"prompt": "q", "responses": ["c", "b", "a"], "rank": ["2", "3", "1"]},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},  # ms-swift
        {"query": "q", "response": "a", "rejected_response": "b"},
        CHOSEN | {"chosen_rank": 1, "rejected_rank": 2, "margin": 0.5, "is_tie": False, "winner": "chosen"},
        CHOSEN | {"chosen_length": 1, "rejected_length": 9, "length_diff": -8},
    ],
)
def test_the_better_answer_is_found(row):
    assert read_row("dpo", row, USUAL)._replace(notes=()) == PAIR


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 2}, "better_response_id is 2; expected 0 or 1"),
        ({"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": True}, "expected 0 or 1"),
        ({"prompt": "q", "response_1": "b", "response_2": "a", "preference": 0}, "preference is 0; expected 1 or 2"),
        ({"prompt": "q", "response_a": "b", "response_b": "a", "winner": "tie (bothbad)"}, "tied: winner prefers none"),
        ({"prompt": "q", "response_a": "b", "response_b": "a", "winner_model_a": 0, "winner_model_b": 0}, "tied"),
        ({"prompt": "q", "response_0": "b", "response_1": "a", "score_0": "nan", "score_1": 1}, "score_0 or score_1 is not a number"),
        (
            {"prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": 1, "score_1": 2, "score_2": 1},
            "preference_strength and score_1 contradict each other",
        ),
        ({"prompt": '["q", "r"]', "response_a": '["a", "c"]', "response_b": '["b", "c"]', "winner": "a"}, "differ before their last"),
        ({"response_0": "b", "response_1": "a", "better_response_id": 1}, "column 'context' is missing"),
        ({"prompt": "q", "responses": ["a", "b"]}, "without a number for each in scores, ratings or ranks"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "without a number for each in scores, ratings or ranks"),
        (CHOSEN | {"chosen_reward": 1.0, "rejected_reward": "2.0"}, "chosen_reward is below rejected_reward"),
        (CHOSEN | {"reward_chosen": 1, "reward_rejected": 1}, "tied: reward_chosen equals reward_rejected"),
        (CHOSEN | {"chosen_rank": 2, "rejected_rank": 1}, "chosen_rank is above rejected_rank"),
        (CHOSEN | {"margin": "-0.5"}, "margin is below 0"),
        (CHOSEN | {"score_diff": 0}, "tied: score_diff is 0"),
        (CHOSEN | {"is_tie": "true"}, "tied: is_tie says so"),
        (CHOSEN | {"winner": "tie"}, "tied: winner is tie"),
        (CHOSEN | {"verdict": "rejected"}, "verdict is rejected"),
    ],
)
def test_a_pair_that_may_be_the_wrong_way_around_is_refused(row, cause):
    found = read_row("dpo", row, USUAL)
    assert isinstance(found, Refused) and cause in str(found)
