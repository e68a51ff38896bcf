"""Rows with the columns that named datasets are documented to have, in words of our own: each is prepared, and proven again."""

import json

import pytest

from data_prep.prepare import prepare
from data_prep.preview import parse as parse_preview
from data_prep.show import show
from data_prep.sources import HUBS
from posttrain.data.prepared import load_prepared

USER, ASSISTANT = {"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A plum."}
WORSE = {"role": "assistant", "content": "A chair."}
HUMAN, GPT = {"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "A plum."}
PLAIN = "user: Name a fruit. | assistant: A plum."
BRIEF = f"system: Be brief. | {PLAIN}"

# by name: a row, what must be trained or read of it, and options; pairs are prompt, chosen and rejected
SFT = {
    "alpaca": (
        {"instruction": "Name a fruit.", "input": "", "output": "A plum.", "text": "Below is: Name a fruit. Response: A plum."},
        PLAIN,
    ),
    "alpaca_cleaned": ({"output": "A plum.", "input": "", "instruction": "Name a fruit."}, PLAIN),
    "dolly": ({"instruction": "Name a fruit.", "context": "", "response": "A plum.", "category": "open_qa"}, PLAIN),
    "ultrachat": ({"prompt": "Name a fruit.", "prompt_id": "x", "messages": [USER, ASSISTANT]}, PLAIN),
    "slimorca": (
        {"conversations": [{"from": "system", "value": "Be brief.", "weight": None}, HUMAN | {"weight": 0.0}, GPT | {"weight": 1.0}]},
        BRIEF,
    ),
    "openhermes": (
        {
            **{
                "custom_instruction": None,
                "topic": None,
                "model_name": None,
                "model": None,
                "skip_prompt_formatting": False,
                "views": None,
            },
            **{
                "category": "orca",
                "views": None,
                "language": None,
                "id": None,
                "title": None,
                "idx": None,
                "hash": None,
                "avatarUrl": None,
            },
            "conversations": [HUMAN | {"weight": None}, GPT | {"weight": None}],
            "system_prompt": "Be brief.",
            "source": "glaive-code-assist",
        },
        BRIEF,
    ),
    "openorca": ({"id": "flan.1", "system_prompt": "Be brief.", "question": "Name a fruit.", "response": "A plum."}, BRIEF),
    "orca_math": ({"question": "Name a fruit.", "answer": "A plum."}, PLAIN),
    "metamath": ({"type": "MATH_AnsAug", "query": "Name a fruit.", "original_question": "Fruit?", "response": "A plum."}, PLAIN),
    "no_robots": ({"prompt": "Name a fruit.", "prompt_id": "x", "messages": [USER, ASSISTANT], "category": "Brainstorm"}, PLAIN),
    "wildchat": (
        {
            **{"conversation_hash": "x", "model": "m", "timestamp": "2024-01-01", "turn": 1, "language": "English", "toxic": False},
            "conversation": [
                {
                    **USER,
                    "country": "X",
                    "hashed_ip": "x",
                    "header": {"user-agent": "x"},
                    "language": "English",
                    "toxic": False,
                    "state": "x",
                },
                {**ASSISTANT, "country": None, "created": None, "language": "English", "redacted": False, "timestamp": "2024-01-01"},
            ],
            **{"openai_moderation": [{"flagged": False}], "detoxify_moderation": [{"toxicity": 0.0}], "redacted": False, "state": "x"},
        },
        PLAIN,
    ),
    "lmsys_chat": (
        {
            **{"conversation_id": "x", "model": "m", "conversation": [USER, ASSISTANT], "turn": 1, "language": "English"},
            **{"openai_moderation": [{"flagged": False}], "redacted": False},
        },
        PLAIN,
    ),
    "tulu3": ({"id": "x", "messages": [USER, ASSISTANT], "source": "s"}, PLAIN),
    "smoltalk": ({"messages": [USER, ASSISTANT], "source": "s"}, PLAIN),
    "smoltalk2": (
        {
            "messages": [USER, ASSISTANT],
            "chat_template_kwargs": {"custom_instructions": "", "enable_thinking": None, "python_tools": [], "xml_tools": []},
            "source": "s",
        },
        PLAIN,
    ),
    "aya": (
        {
            "inputs": "Name a fruit.",
            "targets": "A plum.",
            "language": "English",
            "language_code": "eng",
            "annotation_type": "x",
            "user_id": "x",
        },
        PLAIN,
    ),
    "medical_o1": (
        {"Question": "Name a fruit.", "Complex_CoT": "Plums are fruits.", "Response": "A plum."},
        "user: Name a fruit. | assistant: <think>\nPlums are fruits.\n</think>\n\nA plum.",
    ),
    "openthoughts": (
        {"system": "Be brief.", "conversations": [HUMAN | {"from": "user"}, GPT | {"from": "assistant"}]},
        BRIEF,
    ),
    "glaive": ({"system": "SYSTEM: Be brief.", "chat": "USER: Name a fruit.\n\n\nASSISTANT: A plum. <|endoftext|>\n\n\n"}, BRIEF),
}
PAIR = "Name a fruit. > A plum. > A chair."
BOTH = {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}
DPO = {
    "ultrafeedback": {
        **{"source": "s", "prompt": "Name a fruit.", **BOTH, "chosen-rating": 5.0, "chosen-model": "m", "rejected-rating": 1.0},
        "rejected-model": "n",
    },
    "hh_rlhf": {
        "chosen": "\n\nHuman: Name a fruit.\n\nAssistant: A plum.",
        "rejected": "\n\nHuman: Name a fruit.\n\nAssistant: A chair.",
    },
    "orca_dpo": {"system": "", "question": "Name a fruit.", "chosen": "A plum.", "rejected": "A chair."},
    "distilabel_capybara": {
        **{"source": "s", "conversation": [{"input": "Name a fruit.", "output": "A plum."}], "original_response": "A plum.", **BOTH},
        **{"generation_prompt": ["x"], "raw_generation_responses": ["x"], "new_generations": ["A chair."], "prompt": "Name a fruit."},
        **{"rating_chosen": 5, "rating_rejected": 2, "chosen_model": "m", "rejected_model": "n"},
    },
    "ultrafeedback_original": {
        **{"source": "s", "instruction": "Name a fruit.", "models": ["m", "n"], "correct_answers": ["None"], "incorrect_answers": ["None"]},
        "completions": [
            {
                "annotations": {"helpfulness": {"Rating": "2"}},
                "model": "n",
                "response": "A chair.",
                "overall_score": 2.0,
                "critique": "No.",
            },
            {
                "annotations": {"helpfulness": {"Rating": "5"}},
                "model": "m",
                "response": "A plum.",
                "overall_score": 9.0,
                "critique": "Yes.",
            },
        ],
    },
    "h4_binarized": {
        **{"prompt": "Name a fruit.", "prompt_id": "x", **BOTH, "messages": [USER, ASSISTANT], "score_chosen": 8.0, "score_rejected": 2.0},
    },
    "helpsteer3": {
        **{"domain": "general", "language": "english", "context": [USER], "response1": "A chair.", "response2": "A plum."},
        **{"overall_preference": 3, "individual_preference": [{"score": 3, "reasoning": "x", "feedback1": "x", "feedback2": "x"}]},
    },
    "shp": {
        **{"post_id": "x", "domain": "d", "upvote_ratio": 0.9, "history": "Name a fruit.", "c_root_id_A": "a", "c_root_id_B": "b"},
        **{"score_A": 2, "score_B": 9, "human_ref_A": "A chair.", "human_ref_B": "A plum.", "labels": 0, "seconds_difference": 1.0},
    },
    "nectar": {
        **{"prompt": "\n\nHuman: Name a fruit.\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["s"], "good_natured": True},
        "answers": [{"answer": "A plum.", "model": "m", "rank": 1.0}, {"answer": "A chair.", "model": "n", "rank": 7.0}],
    },
    "orpo_mix": {"source": "s", **BOTH, "prompt": "Name a fruit.", "question": None},
    "dpo_mix": {"dataset": "s", **BOTH, "chosen_rating": 5.0, "rejected_rating": 1.0, "chosen_model": "m", "rejected_model": "n"},
    "ultrainteract": {
        **{"id": "x", "parent_id": "y", "task": "Coding", "dataset": "s", "chosen": "A plum.", "rejected": "A chair."},
        "trajectory": [{"from": "user", "value": "Name a fruit."}],
    },
    "tulu3_preferences": {"id": "x", "source": "s", "prompt": "Name a fruit.", "chosen_model": "m", "rejected_model": "n", **BOTH},
    "stack_paired": {
        **{
            "qid": 1,
            "question": "Name a fruit.",
            "date": "2020-01-01",
            "metadata": ["x"],
            "response_j": "A plum.",
            "response_k": "A chair.",
        },
    },
}


def prepared(kind: str, name: str, row: dict, folder, tokenizer: str):
    """Prepare a row as the named dataset's, prove it again, and return the prepared folder's rows."""
    (folder / "rows.jsonl").write_text(json.dumps(row))
    out = folder / "out"
    where = ["--dataset", name, "--source", str(folder / "rows.jsonl"), "--output_dir", str(out)]
    prepare(kind, [*where, "--tokenizer", tokenizer, "--val_size", "0"])
    show(parse_preview([str(out), "--check"]))
    return load_prepared(str(out), kind, "").train


def text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", SFT)
def test_a_row_for_sft(tiny, tmp_path, name):
    row, expected = SFT[name]
    read = text(tiny.tokenizer, prepared("sft", name, row, tmp_path, tiny.base)[0]["input_ids"])
    turns = [turn.removesuffix("<|im_end|>\n").replace("\n", ": ", 1) for turn in read.split("<|im_start|>")[1:]]
    assert " | ".join(turns) == expected


@pytest.mark.parametrize("name", DPO)
def test_a_row_for_dpo(tiny, tmp_path, name):
    row = prepared("dpo", name, DPO[name], tmp_path, tiny.base)[0]
    prompt, *answers = (text(tiny.tokenizer, row[column]) for column in ("prompt", "chosen", "rejected"))
    asked = prompt.split("user\n")[1].split("<|im_end|>")[0]
    assert " > ".join([asked, *(answer.removesuffix("<|im_end|>") for answer in answers)]) == PAIR


def test_every_named_dataset_is_tried():
    assert {*SFT, "oasst1", "xlam"} == {*HUBS["sft"]}  # trees in test_shapes.py, tools in test_templates.py
    assert {*DPO} == {*HUBS["dpo"]}
