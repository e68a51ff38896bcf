# ruff: noqa: E402
"""Which models are trained, and how? python benchmarks/models.py --all     writes results/models.json, and the table of docs/models.md

A small random model of every family of causal language models that the installed transformers has goes through the real commands: one step
of SFT on all rows, whose loss and gradient norm plain transformers computes, too, one row at a time; and two steps of DPO with shared
prompts and with two, whose curves should be the same. Names choose families; the other rows of the file stay as they are.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

import torch
import transformers
import warm
from bases import first_step
from tiny import make_tiny

from benchmarks.side_by_side import RESULTS, as_text, machine, versions
from benchmarks.tiny_models import families, tiny_model
from data_prep.prepare import prepare
from posttrain.common.errors import first_line
from posttrain.common.files import read_json_lines
from posttrain.data.prepared import load_prepared

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- written by benchmarks/models.py --all -->\n", "<!-- to here -->\n"
NUMBERS = ["--warmup_iters=0", "--dtype=float32", "--eval_interval=0", "--grad_clip=0", "--max_tokens_per_gpu=600", "--save_interval=0"]
PATIENCE = 300  # seconds for a run
LOSS, NORM, CURVE = 2e-4, 1e-3, 1e-3  # largest differences: of the loss; of gradient norms and DPO's curves, relative
PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every family that transformers has")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where to write models.json; the page stays as it is")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="a model type of transformers, such as gemma3_text")
    options = parser.parse_args()
    if options.all == bool(options.families) or (unknown := set(options.families) - set(families())):
        parser.error(
            f"no such families: {', '.join(sorted(unknown))}" if options.families and not options.all else "name families, or --all"
        )
    file = options.out / "models.json"
    rows = {row["family"]: row for row in json.loads(file.read_text(encoding="utf-8"))["families"]} if file.is_file() else {}
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        make_tiny(Path(name))
        sft, dpo, tokenizer = _rows(Path(name))
        warm.own()
        warm.run("posttrain/sft.py", "--help")  # starts the process that all others are forked from
        asked = [(family, sft, dpo, tokenizer, f"{name}/{family}") for family in options.families or families()]
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            for row in pool.imap_unordered(tried, asked):
                print(row, flush=True)
                rows[row["family"]] = row
                found = {"machine": machine(), "versions": versions(), "families": [rows[known] for known in families() if known in rows]}
                file.write_text(as_text(found), encoding="utf-8")
    if options.out == RESULTS:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text(before + BEGIN + table(found["families"]) + END + after, encoding="utf-8")


def _rows(folder: Path) -> tuple[str, str, str]:
    """Prepare the tiny world's rows with a byte-level tokenizer; return the folders of SFT, of DPO and of the tokenizer.

    Beside a config.json of Qwen2 or Qwen3.5, transformers 5.23 opens any tokenizer as Qwen's, so it is one.
    """
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        [(folder / "text.txt").read_text(encoding="utf-8").splitlines()], vocab_size=400
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder / "tokenizer")
    for kind in ("sft", "dpo"):
        paths = ["--source", f"{folder}/{kind}.jsonl", "--output_dir", f"{folder}/rows_{kind}", "--tokenizer", f"{folder}/tokenizer"]
        prepare(kind, [*paths, "--val_size", "7"])
    return f"{folder}/rows_sft", f"{folder}/rows_dpo", f"{folder}/tokenizer"


def tried(asked: tuple) -> dict:
    """Return the row of a family: how it is trained, and how far that is from plain transformers."""
    torch.set_num_threads(1)
    family, sft, dpo, tokenizer, folder = asked
    base = Path(folder, "base")
    try:
        tiny_model(family, len(transformers.AutoTokenizer.from_pretrained(tokenizer))).save_pretrained(base)
        expected = first_step(str(base), load_prepared(sft, "sft", "").train)
    except Exception as error:  # of any kind: transformers' own code fails with it
        return {"family": family, "trained": "not tried", "why": f"{type(error).__name__}: {first_line(error)}"[:200]}
    try:
        return {"family": family} | _answers(base, sft, tokenizer, folder, expected) | _pairs(base, dpo, tokenizer, folder)
    except subprocess.TimeoutExpired:
        return {"family": family, "trained": "not tried", "why": f"a run took longer than {PATIENCE} s"}


def _answers(base: Path, sft: str, tokenizer: str, folder: str, expected: tuple[float, float]) -> dict:
    """Return how SFT trains a model, and by how much its first step's loss and gradient norm differ from the expected ones."""
    paths = [f"--checkpoint_path={base}", f"--tokenizer={tokenizer}", f"--sft_data_dir={sft}", f"--out_dir={folder}/sft"]
    count = len(load_prepared(sft, "sft", "").train)
    done = warm.run("posttrain/sft.py", *paths, *NUMBERS, f"--global_batch_size={count}", "--max_iters=1", timeout=PATIENCE)
    if done.returncode:
        return {"trained": "refused", "why": _sentence(done.stdout)[:300]}
    step = read_json_lines(Path(folder, "sft", "metrics.jsonl"))[0]
    apart = re.search(r"attention: transformers' own, .*?, which is slower \((.*)\)", done.stdout)
    row = {"trained": "a row at a time", "why": apart[1][:300]} if apart else {"trained": "packed"}
    return row | {"loss_differs": abs(step["loss"] - expected[0]), "norm_differs": abs(step["grad_norm"] / expected[1] - 1)}


def _pairs(base: Path, dpo: str, tokenizer: str, folder: str) -> dict:
    """Return by how much DPO's curve with shared prompts differs from that with two prompts."""
    curves = []
    for shares in (True, False):
        paths = [f"--sft_checkpoint_path={base}", f"--tokenizer={tokenizer}", f"--dpo_data_dir={dpo}", f"--out_dir={folder}/dpo_{shares}"]
        way = [f"--share_prompt={shares}", "--max_iters=2", "--global_batch_size=8"]
        done = warm.run("posttrain/dpo.py", *paths, *NUMBERS, *way, timeout=PATIENCE)
        if done.returncode:
            return {"pairs": f"refused: {_sentence(done.stdout)[:200]}"}
        steps = read_json_lines(Path(folder, f"dpo_{shares}", "metrics.jsonl"))
        curves.append(torch.tensor([[step["loss"], step["grad_norm"]] for step in steps]))
    return {"pairs_differ": (curves[0] / curves[1] - 1).abs().max().item()}


def _sentence(output: str) -> str:
    """Return the error in what a command has printed."""
    found = re.findall(r"^(?:error: |\w*Error: )(.*)$", output, re.M)
    return found[-1] if found else output[-300:]


def verdict(row: dict) -> str:
    """Return in how far a family's numbers are transformers' own."""
    if "loss_differs" not in row:
        return row["trained"]
    is_right = row["loss_differs"] < LOSS and row["norm_differs"] < NORM
    return row["trained"] if is_right else f"{row['trained']}, with other numbers"


def table(rows: list[dict]) -> str:
    """Return the table of docs/models.md."""
    lines = [f"Of {len(rows)} families of transformers {transformers.__version__}, as small random models: "]
    kinds = [verdict(row) for row in rows]
    counts = {kind: kinds.count(kind) for kind in ("packed", "a row at a time", "refused", "not tried")}
    lines[0] += ", ".join(f"{count} {kind}" for kind, count in counts.items()) + ".\n"
    lines += ["| family | trained | loss differs by | gradient norm | shared prompts |", "|---|---|---|---|---|"]
    for row, kind in zip(rows, kinds, strict=True):
        numbers = [f"{row[name]:.0e}" if name in row else "" for name in ("loss_differs", "norm_differs")]
        shares = "" if "pairs_differ" not in row else "yes" if row["pairs_differ"] < CURVE else f"differ by {row['pairs_differ']:.0e}"
        why = re.sub(r"[|<>`*]", " ", row.get("why", ""))
        lines.append(f"| {row['family']} | {kind}{': ' * bool(why)}{why} | {' | '.join(numbers)} | {shares or row.get('pairs', '')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
