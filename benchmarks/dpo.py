# ruff: noqa: E402
"""DPO beside TRL, with a live reference: python benchmarks/dpo.py [--rounds 5]

Writes results/dpo_ultrafeedback_cpu.json and dpo_hh_cpu.json. Two ranks, ZeRO-2, bfloat16, a Qwen3 of 7 million parameters. Pairs as long
as UltraFeedback's (about 254, 426 and 370 tokens of prompt, chosen and rejected), 16 a step; and as Anthropic's HH's (about
135, 41 and 51), where ours also runs with the prompt computed for each answer apart.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.sft import MODEL, NO_RECOMPUTING
from benchmarks.side_by_side import Contestant, Race, compete

COMMON = {"kind": "dpo", "model": MODEL, "batch": 16, "ds_config": "ds_configs/zero2.json", "ranks": 2}
RACES = {  # spreads of the logarithm as in the data sets themselves, tails cut
    "ultrafeedback": Race(lengths={"prompt": (320, 1.3), "chosen": (475, 0.9), "rejected": (450, 0.9)}, longest=1300, steps=9, **COMMON),
    "hh": Race(lengths={"prompt": (132, 1.0), "chosen": (41, 0.87), "rejected": (51, 0.92)}, longest=900, steps=14, **COMMON),
}
SMALL_BATCH = NO_RECOMPUTING | {"per_device_train_batch_size": 1}  # no padding of pairs to each other; padding_free is off in TRL 1.16
OURS = Contestant("ours", "ours", "posttrain, defaults")
CONTESTANTS = {
    "ultrafeedback": [
        OURS,
        Contestant("trl", "trl", "TRL, defaults"),
        Contestant("trl_no_checkpointing", "trl", "TRL, no activation checkpointing", NO_RECOMPUTING),
        Contestant("trl_batch_1", "trl", "TRL, 1 pair a batch, no activation checkpointing", SMALL_BATCH),
    ],
    "hh": [
        OURS,
        Contestant("ours_prompt_twice", "ours", "posttrain, --share_prompt=False", {"share_prompt": False}),
        Contestant("trl_no_checkpointing", "trl", "TRL, no activation checkpointing", NO_RECOMPUTING),
        Contestant("trl_batch_1", "trl", "TRL, 1 pair a batch, no activation checkpointing", SMALL_BATCH),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", nargs="*", default=list(RACES), choices=RACES)
    options = parser.parse_args()
    for name in options.data:
        compete(f"dpo_{name}_cpu", RACES[name], CONTESTANTS[name], options.rounds)


if __name__ == "__main__":
    main()
