# ruff: noqa: E402
"""Are spoiled runs reported by their health line, and ordinary ones not? python benchmarks/health.py     writes results/health.json

It uses the quickstart's base model, data and recipes on two CPU ranks, after bash launch/quickstart.sh. Three runs are spoiled: a learning
rate 100 times as high, pairs whose chosen and rejected answers are swapped, and SFT rows of which every second comes twice. They run for a
tenth of their steps; three ordinary runs, one of them on the same pairs without the swap, run to their end.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.side_by_side import RESULTS, as_text, machine, versions
from posttrain.common.files import read_json_lines

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "runs" / "quickstart"
SFT, DPO = ("launch/quickstart/sft.yaml", "launch/quickstart/dpo.yaml")


def prepare(kind: str, rows: list[dict], folder: Path) -> Path:
    """Prepare rows of this kind in FOLDER, and return the data's folder."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, f"data_prep/prepare_{kind}.py", f"--source={folder}/rows.jsonl", f"--output_dir={folder}/data"]
    base = f"--tokenizer={ROOT}/launch/quickstart/base"
    subprocess.run([*command, base, "--duplicates=keep"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def worlds(folder: Path) -> dict[str, tuple[str, list[str], bool]]:
    """Recipe, changes to it, and whether the run is spoiled, by the run's name."""
    rows = read_json_lines(QUICKSTART / "world" / "sft.jsonl")
    draw = random.Random(0)
    questions, answers = ([row["messages"][number]["content"] for row in rows] for number in (0, 1))
    others = draw.sample(answers, len(answers))  # to other questions
    pairs = [
        {"prompt": question, "chosen": answer, "rejected": other}
        for question, answer, other in zip(questions, answers, others, strict=True)
    ]
    pairs = draw.sample([pair for pair in pairs if pair["chosen"] != pair["rejected"]], 6000)
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    right, wrong_way = prepare("dpo", pairs, folder / "pairs"), prepare("dpo", swapped, folder / "swapped")
    twice = prepare("sft", [row for number, row in enumerate(rows) for _ in range(1 + number % 2)], folder / "twice")
    return {
        "SFT of the quickstart": (SFT, [], False),
        "DPO of the quickstart": (DPO, [], False),
        "DPO on right and wrong answers": (DPO, [f"--dpo_data_dir={right}"], False),
        "SFT, learning rate x 100": (SFT, ["--learning_rate=0.035"], True),
        "DPO, chosen and rejected swapped": (DPO, [f"--dpo_data_dir={wrong_way}"], True),
        "SFT, every second row twice": (SFT, [f"--sft_data_dir={twice}"], True),
    }


def watch(recipe: str, changes: list[str], ill: bool, out: Path) -> dict:
    """Run a recipe, a spoiled one for a tenth of its steps, and return what was reported about its health."""
    command = ["deepspeed", "--quiet", "--num_gpus", "2", "posttrain/" + Path(recipe).stem + ".py", recipe, f"--out_dir={out}", *changes]
    log = out.with_suffix(".log").open("w", encoding="utf-8")
    supervised = [sys.executable, "launch/supervise.py", *command, "--save_interval=0"]
    run = subprocess.Popen(supervised, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while run.poll() is None:
        time.sleep(1)
        records = read_json_lines(out / "metrics.jsonl")
        if ill and records and records[-1]["step"] > json.loads((out / "run.json").read_text(encoding="utf-8"))["total_steps"] / 10:
            run.send_signal(signal.SIGTERM)
            run.wait()
    total = json.loads((out / "run.json").read_text(encoding="utf-8"))["total_steps"]
    found = read_json_lines(out / "health.jsonl")
    steps = max((record["step"] for record in read_json_lines(out / "metrics.jsonl")), default=0)
    return {"ill": ill, "steps": steps, "of": total, "findings": [{name: one[name] for name in ("step", "name", "what")} for one in found]}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not (QUICKSTART / "sft" / "final").is_dir():
        sys.exit(f"{QUICKSTART} has no results yet: bash launch/quickstart.sh")
    results = {"machine": machine(), "versions": versions(), "runs": {}}
    with tempfile.TemporaryDirectory(prefix="posttrain_health_") as folder:
        for number, (name, run) in enumerate(worlds(Path(folder)).items()):
            results["runs"][name] = watch(*run, Path(folder) / str(number))
            print(name, results["runs"][name], flush=True)
    (RESULTS / "health.json").write_text(as_text(results), encoding="utf-8")


if __name__ == "__main__":
    main()
