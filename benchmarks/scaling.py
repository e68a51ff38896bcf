# ruff: noqa: E402
"""Does the cost of a step depend on the number of rows, or of micro-batches in a step? python benchmarks/scaling.py

SFT on two ranks, ZeRO-2, bfloat16, with micro-batches of at most 2,048 tokens. The Qwen3 has only a million parameters, so that whatever is
not the model shows. Rows from 1,000 to 100,000 at 64 a step, then examples a step from 64 to 1,024. Written to results/scaling.json.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.side_by_side import RESULTS, Contestant, Race, as_text, machine, make_world, run_once, versions

RACE = Race(
    "SFT of a model of a million parameters",
    kind="sft",
    lengths={"instruction": (15, 0.4), "output": (20, 0.6)},
    longest=200,
    model={"vocab_size": 6400, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 1024},
    batch=64,
    steps=22,
    ds_config="ds_configs/zero2.json",
    ranks=2,
)
ROWS = (1_000, 10_000, 100_000)
BATCHES = (64, 256, 1024)
EXAMPLES = 12 * 1024  # in each run, so that all have as many micro-batches
ROUNDS = 3
# the longest rows of a step exceed this limit in every run, so the largest micro-batch, which step 1 tries, is as large in each
OURS = Contestant("ours", "ours", "posttrain", {"max_tokens_per_gpu": 2048})


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = {"machine": machine(), "versions": versions(), "rows": {}, "examples_a_step": {}}
    with tempfile.TemporaryDirectory(prefix="posttrain_scaling_") as folder:
        worlds = {}
        for rows in ROWS:
            worlds[rows] = Path(folder) / str(rows)
            worlds[rows].mkdir()
            make_world(replace(RACE, rows=rows), worlds[rows])
        cells = [("rows", rows, replace(RACE, rows=rows), worlds[rows]) for rows in ROWS]
        cells += [("examples_a_step", batch, replace(RACE, batch=batch, steps=EXAMPLES // batch), worlds[ROWS[-1]]) for batch in BATCHES]
        for _ in range(ROUNDS):
            for what, value, race, world in cells:
                result = run_once(race, OURS, world)
                if isinstance(result, str):
                    sys.exit(result)
                results[what].setdefault(str(value), []).append(result)
                print(
                    f"{what:16} {value:>8,}  {result['tokens_per_second']:,.0f} tokens/s  {result['peak_mb_without_files']:,.0f} MB",
                    flush=True,
                )
    (RESULTS / "scaling.json").write_text(as_text(results), encoding="utf-8")


if __name__ == "__main__":
    main()
