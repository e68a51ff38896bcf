"""Inputs from the field, each run as written: what they become is what a careful user expects. They lie outside of the repository."""

import os
import shutil
from pathlib import Path

from data_prep.prepare import prepare
from posttrain.data.parts import trained_spans
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
