# ruff: noqa: E402
"""How far is a result from the model that was trained? python benchmarks/model_folders.py     writes results/model_folders.json

Bases with folders as people have them (tests/bases.py) go through data preparation and SFT by the real commands, for one step of a
learning rate near 0, in float32. Then plain transformers computes the log-probs of a few rows with the base and with final/, for which
they should be the same. `--before CHECKOUT` does the same with another checkout of this repository beside it. Words choose the cases whose
titles begin with one of them; the other rows of the file stay as they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

import bases
import torch
from tiny import make_tiny
from transformers import AutoModelForCausalLM

from benchmarks.side_by_side import RESULTS, as_text, machine, versions
from posttrain.common.files import read_json_lines

STEP = ["--dtype=float32", "--max_iters=1", "--warmup_iters=0", "--global_batch_size=8", "--eval_interval=0", "--max_tokens_per_gpu=2000"]
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
OLDER = "transformers==4.57.6"
LOGPS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    for n in (9, 40, 200):
        ids = torch.arange(n) * 7919 % model.config.vocab_size
        print(json.dumps(model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].tolist()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("titles", nargs="*", metavar="TITLE", help="the beginning of a case's title; without any all are measured")
    options = parser.parse_args()
    file, chosen = RESULTS / "model_folders.json", tuple(options.titles) or ("",)
    rows = {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))["cases"]} if options.titles else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny, older = make_tiny(folder), folder / "older"
        install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, "--target", older]
        subprocess.run([*install, OLDER], check=True)
        for number, (title, (make, measure)) in enumerate(CASES.items()):
            if not title.startswith(chosen):
                continue
            rows[title] = {"case": title}
            for when, code in (("before", options.before), ("after", ROOT)):
                if code:
                    place = folder / f"{number}_{when}"
                    case = SimpleNamespace(code=code, tiny=tiny, place=place, older=older, base=make(tiny, place / "base"))
                    rows[title][when] = measure(case)
            print(rows[title], flush=True)
            ordered = [rows[title] for title in CASES if title in rows]
            content = {"machine": machine(), "versions": versions(), "cases": ordered}
            file.write_text(as_text(content), encoding="utf-8")


def train(case: SimpleNamespace, base: Path, out: str = "run", *more: str) -> tuple[Path, str]:
    """Train a base by the real command; returns the run, and the error of one that was refused, else an empty text."""
    run = case.place / out
    options = {one.partition("=")[0]: one for one in (*STEP, "--learning_rate=1e-7", "--min_lr=0", *more)}
    paths = [f"--checkpoint_path={base}", f"--sft_data_dir={case.tiny.sft}", f"--out_dir={run}"]
    done = subprocess.run(
        [sys.executable, "posttrain/sft.py", *paths, *options.values()],
        cwd=case.code,
        env=ENVIRONMENT | {"PYTHONPATH": str(case.code)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return run, "" if done.returncode == 0 else next(line for line in done.stderr.splitlines() if line.startswith("error"))


def logps(folder: Path, older: Path | None = None) -> list[torch.Tensor]:
    """Return by plain transformers, or by transformers 4, the log-probs of the tokens of three rows."""
    environment = ENVIRONMENT | ({"PYTHONPATH": str(older)} if older else {})
    done = subprocess.run([sys.executable, "-c", LOGPS, folder], env=environment, cwd="/", check=True, capture_output=True, text=True)
    return [torch.tensor(json.loads(line)) for line in done.stdout.splitlines()]


def of_the_result(case: SimpleNamespace) -> str:
    """Measure how far final/ is from the base, which a step of this learning rate does not change."""
    run, error = train(case, case.base)
    return "refused" if error else nats(logps(case.base), logps(run / "final"))


def in_transformers_4(case: SimpleNamespace) -> str:
    """Measure how far final/, opened by transformers 4, is from the base in transformers 5."""
    run, error = train(case, case.base)
    return "refused" if error else nats(logps(case.base), logps(run / "final", case.older))


def of_the_loss(case: SimpleNamespace) -> str:
    """Measure how far the first loss is from that of transformers' own passes over each row alone."""
    from datasets import load_from_disk

    run, error = train(case, case.base, "run", "--global_batch_size=53")  # all rows of the tiny world
    if error:
        return "refused"
    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32).eval()
    total = count = 0
    for row in sorted(load_from_disk(f"{case.tiny.sft}/train"), key=lambda row: len(row["input_ids"])):
        labels = torch.tensor(row["labels"])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels[None]).loss.item()
        trained = int((labels[1:] != -100).sum())
        total, count = total + loss * trained, count + trained
    seen = next(record["loss"] for record in read_json_lines(run / "metrics.jsonl") if record["split"] == "train")
    return f"{abs(seen - total / count):.1e} nats a token"


def of_the_end_token(case: SimpleNamespace) -> str:
    """Measure how far the end token's input embedding moves in a second stage, beside the mean of all rows that the data uses."""
    first, _ = train(case, case.base, "first", "--learning_rate=1e-3")
    second, _ = train(case, first / "final", "second", "--learning_rate=1e-3", "--weight_decay=0", "--max_iters=4")
    tables = [
        AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32).get_input_embeddings().weight for run in (first, second)
    ]
    moved = (tables[0] - tables[1]).abs().amax(1)
    return f"{moved[case.tiny.chat.end_id].item():.1e} (others {moved[moved > 0].mean().item():.1e})"


def nats(expected: list[torch.Tensor], seen: list[torch.Tensor]) -> str:
    """Return the largest difference of a token's log-prob."""
    return f"{max((a - b).abs().max().item() for a, b in zip(expected, seen, strict=True)):.1e} nats"


def made(kind: str, **settings) -> Callable:
    """Return a maker of a base of this kind."""
    return lambda tiny, folder: bases.make(tiny, folder, kind, **settings)


def denies_its_biases(tiny, folder: Path) -> Path:
    """Write a base whose file has biases of attention, which its config.json denies; it is measured as with them."""
    bases.make(tiny, folder, attention_bias=True)
    bases.edit_tensors(folder, lambda state: {n: torch.randn_like(t) if n.endswith(".bias") else t for n, t in state.items()})
    return folder


def without_biases(case: SimpleNamespace) -> str:
    """Measure how far final/ is from the base with its biases."""
    right = logps(case.base)
    bases.edit(case.base, {"attention_bias": False})
    run, error = train(case, case.base)
    return "refused" if error else nats(right, logps(run / "final"))


LONGROPE = {"original_max_position_embeddings": 32, "pad_token_id": 0, "rope_parameters": bases.LONGROPE}
CASES = {
    "1. persistent buffers of an activation (Apertus)": (bases.with_activation_buffers, of_the_result),
    "1. a router's correction bias (DeepSeek V3)": (bases.with_router_bias, of_the_result),
    "1. tied by config.json, two matrices in the file": (bases.tied_by_flag_only, of_the_result),
    "2. biases in the file that config.json denies": (denies_its_biases, without_biases),
    "3. longrope, short and long rows together (Phi-3)": (made("phi3", **LONGROPE), of_the_loss),
    "4. rope_theta 1e6, read by transformers 4.57": (
        made("qwen3", head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        in_transformers_4,
    ),
    "4. llama3 scaling, read by transformers 4.57": (
        made("llama", rope_parameters=bases.LLAMA3 | {"original_max_position_embeddings": 64}),
        in_transformers_4,
    ),
    "5. the end token's input embedding, moved in a second stage": (made("llama"), of_the_end_token),
}


if __name__ == "__main__":
    main()
