"""Inputs from the field, each run as written: what they become is what a careful user expects. They lie outside of the repository."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from posttrain.data.encoded import trained_spans
from posttrain.data.prepared import load_prepared
from posttrain.data.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(os.environ.get("POSTTRAIN_SHARED_DATA", ROOT.parent / "shared" / "data")) / "field_cases"


def prepared_text(output: Path, kind: str) -> dict[str, list[str]]:
    """What a prepared folder trains on, by split: each row as text, in which [[ ]] stands around what is trained."""
    data = load_prepared(str(output), kind, "")
    tokenizer = load_tokenizer(str(output / "tokenizer"), data.manifest["template_name"])

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def shown(row: dict) -> str:
        if kind == "dpo":
            return "{} | {} | {}".format(*(text(row[name]) for name in ("prompt", "chosen", "rejected")))
        ids, at, found = row["input_ids"], 0, ""
        for start, end in trained_spans(row["labels"]):
            found += f"{text(ids[at:start])}[[{text(ids[start:end])}]]"
            at = end
        return found + text(ids[at:])

    return {name: [shown(split[i]) for i in range(len(split))] for name, split in (("train", data.train), ("validation", data.validation))}


def outcome(case: dict, folder: Path) -> str | dict[str, list[str]]:
    """Run a case as written: the rows that come out, or the message with which it is refused."""
    kind = "sft" if "sft" in case["script"] else "dpo"
    tokenizer = qwen3(folder) if case["tokenizer"] == "qwen3" else CASES / case["tokenizer"]
    here = os.getcwd()
    os.chdir(CASES)
    try:
        prepare(kind, ["--dataset", case["dataset"], "--tokenizer", str(tokenizer), *case["args"], "--output_dir", str(folder / "out")])
    except (ValueError, OSError) as error:
        return str(error)
    finally:
        os.chdir(here)
    return prepared_text(folder / "out", kind)


def qwen3(folder: Path) -> Path:
    """A folder with Qwen3's tokenizer, as the cases want it."""
    source, made = CASES.parent / "qwen_tokenizer", folder / "qwen3"
    made.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, made / name)
    shutil.copy(source / "qwen3_tokenizer_config.json", made / "tokenizer_config.json")
    return made


def turn(role: str, text: str) -> str:
    """A turn of ChatML."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def answer(text: str) -> str:
    """A trained turn of ChatML."""
    return f"<|im_start|>assistant\n[[{text}<|im_end|>]]\n"


ASKED = turn("user", "Name a fruit.")
PLUM = ASKED + answer("A plum.")
BRIEF, PIRATE = turn("system", "Be brief.") + PLUM, turn("system", "Answer like a pirate.") + ASKED + answer("A plum, arr.")
RED = ASKED + answer("A plum.") + turn("user", "And a red one?") + answer("A cherry.")
MASKED = turn("user", "Hi.") + turn("assistant", "Go away.") + PLUM
THOUGHT = "<think>\nPlums are fruits.\n</think>\n\nA plum."
THREE = [PLUM, turn("user", "Name a tree.") + answer("An oak."), turn("user", "Name a bird.") + answer("A wren.")]
HELD_OUT = turn("user", "Held out?") + answer("Yes, held out.")
PAIR = f"{ASKED}<|im_start|>assistant\n | A plum.<|im_end|> | A chair.<|im_end|>"
CALL = '<tool_call>\n{"name": "look", "arguments": {"where": "sky"}}\n</tool_call>'
RESULT = turn("user", "<tool_response>\nblue\n</tool_response>")
EMPTY = "<|im_start|>assistant\n<think>\n\n</think>\n\n"  # which Qwen3's template writes before the last answer
OWN_CALL = '{"name": "look", "arguments": {"where": "sky"}}'
# What comes out, by case: the rows of training; those of training and validation; texts that the rows hold; or how it is refused
ROWS: dict[str, list[str] | tuple[list[str], list[str]]] = {
    **{key: [PAIR] for key in ("d01_h4_binarized", "d03_orpo_mix_question_null", "d05_helpsteer3", "d06_nectar", "d08_shp")},
    **{key: [PAIR] for key in ("d07_ultrafeedback_original", "d12_lf_old_ranking", "d13_stack_paired", "d15_json_strings")},
    "d18_h4_second_row_other": [turn("system", "Be brief.") + PAIR],
    "d04_dpo_mix_rating_tie": [f"{turn('user', 'Name a tree.')}<|im_start|>assistant\n | An oak.<|im_end|> | A rock.<|im_end|>"],
    **dict.fromkeys(("f02_save_to_disk", "f03_hub_clone_infos", "f17_arrow_file", "f23_macos_dot_underscore"), THREE),
    **dict.fromkeys(("f04_evaluation_file", "f24_h4_splits"), (THREE, [HELD_OUT])),
    **{key: [PLUM] for key in ("f07_tsv", "f09_csv_utf16", "f14_pretty_object")},
    "f19_txt": ["[[Plums are fruits.<|im_end|>]]"],
    **{key: [PLUM] for key in ("s01_trl_prompt_completion", "s07_lmsys_conversation", "s10_query_response", "s14_aya_flan")},
    **{key: [PLUM] for key in ("s15_openhermes", "s16_weight_null_parquet_json", "s27_empty_system", "s28_messages_json_text")},
    **{key: [PIRATE] for key in ("s05_openorca", "s06_system_prompt_column")},
    **{key: [BRIEF] for key in ("s23_developer_role", "s43_slimorca_weight", "s47_system_column_and_message")},
    "s11_swift_history": [RED],
    "s48_swift_query": [turn("system", "Be brief.") + RED],
    **{key: [MASKED] for key in ("s17_swift_loss_false", "s19_torchtune_masked")},
    "s13_medical_o1": [ASKED + answer("<think>\nI think.\n</think>\n\nA plum.")],
    **{key: [ASKED + answer(THOUGHT)] for key in ("s20_thinking_key", "k01_qwen3_think_last")},
    "s37_text_chat_markers": [f"[[{ASKED}<|im_start|>assistant\nA plum.<|im_end|>\n<|im_end|>]]"],
    "s50_two_answer_columns": [turn("user", "Add the two numbers.\n\n2 and 3") + answer("5"), PLUM],
    "t19_surrogate_in_args": [f"{ASKED}{EMPTY}[[A plum.<|im_end|>]]\n"],
    "t18_empty_tool_result": [
        turn("user", "Delete it.")
        + answer('<tool_call>\n{"name": "run", "arguments": {"cmd": "rm x"}}\n</tool_call>')
        + turn("user", "<tool_response>\n\n</tool_response>")
        + f"{EMPTY}[[Done.<|im_end|>]]\n"
    ],
    "t23_glaive_v2": [turn("system", "You can call functions.") + turn("user", "Hi.") + answer("Hello.")],
    "c01_phi_rstrip": ["<|user|>Name a fruit.<|end|><|assistant|>[[A plum.<|end|>]]<|endoftext|>"],
}
HOLDS = {
    "f18_json_type_parquet": [f"[[{CALL}<|im_end|>]]", RESULT, "[[Blue.<|im_end|>]]"],
    "t04_to_json_nulls": [f"[[{CALL}<|im_end|>]]", '"properties": {"where": {"type": "string"}}}', "[[Blue.<|im_end|>]]"],
    "t06_lf_parallel_function_call": [f"[[{CALL.replace('sky', 'left')}\n{CALL.replace('sky', 'right')}<|im_end|>]]"],
    "t07_swift_tool_roles": [f"[[{CALL}<|im_end|>]]", RESULT, "[[Blue.<|im_end|>]]"],
    "t09_legacy_function_call": [f"[[{CALL}<|im_end|>]]", RESULT, "[[Blue.<|im_end|>]]"],
    # its template describes tools only as long as the question is the last message, so each answer is trained after what it will see
    "t11_mistral_ids": [f'[[[TOOL_CALLS] [{OWN_CALL[:-1]}, "id": "abcdefghi"}}]</s>]]', '"call_id": "abcdefghi"}', "[[ It is blue.</s>]]"],
    "t12_tool_name": ["<|im_start|>tool\n<result name=look>blue<|im_end|>", f"[[<call>{OWN_CALL}</call><|im_end|>]]"],
    "t15_two_templates": ["<|im_start|>system\nTools: [", f"[[<call>{OWN_CALL}</call><|im_end|>]]", "[[Blue.<|im_end|>]]"],
    "t16_llama31_json_result": ['"{\\"colour\\": \\"blue\\"}"<|eot_id|>', '[[{"name": "look", "parameters": {"where": "sky"}}<|eot_id|>]]'],
}
REFUSED = {
    "c12_unk": "the vocabulary lacks characters of it",
    "f08_zst": "cannot be read to its end, is it whole",  # it is a frame of zstd without an end
    **dict.fromkeys(("s02_kto_messages_label", "s03_trl_unpaired"), "2 x label rates the answer .*--keep label=true"),
    "s24_images_column": "column images would be lost",
    "s25_llava_image": "column image would be lost",
    "s26_smoltalk2_kwargs": "chat_template_kwargs custom_instructions is not read by the template, so it would be lost",
    "t13_template_ignores_calls": "the template does not write the tool calls",
    "t24_xlam": "tool calls need the tokenizer's own template",  # and not ChatML, as which the case is written
}
FOUND = [json.loads(line) for line in (CASES / "cases.jsonl").read_text().splitlines()] if CASES.is_dir() else []


@pytest.mark.skipif(not FOUND, reason="the cases are not on this machine")
def test_every_case_is_judged():
    assert {case["case"] for case in FOUND} == {*ROWS, *HOLDS, *REFUSED}


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case["case"])
def test_a_case_from_the_field(case, tmp_path):
    name, seen = case["case"], outcome(case, tmp_path)
    if name in REFUSED:
        assert isinstance(seen, str) and re.search(REFUSED[name], seen), seen
        return
    assert isinstance(seen, dict), seen
    if name in ROWS:
        training, held_out = ROWS[name] if isinstance(ROWS[name], tuple) else (ROWS[name], [])
        assert sorted(seen["train"]) == sorted(training) and sorted(seen["validation"]) == sorted(held_out)
        return
    rows = "\n".join(seen["train"])
    for text in HOLDS[name]:
        assert text in rows, rows
    assert '"x": null' not in rows
