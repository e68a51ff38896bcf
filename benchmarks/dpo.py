# ruff: noqa: E402
"""DPO beside TRL, both with a live reference: python benchmarks/dpo.py [--race RACE ...]

Pairs as long as UltraFeedback's (about 254, 426 and 370 tokens of prompt, chosen and rejected) or Anthropic's HH's (about 135, 41 and 51),
the latter also with posttrain computing the prompt for each answer. Machines, models and result files as in sft.py.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.sft import MODEL, NO_RECOMPUTING, ON_CPU, ON_GPU, QWEN3_1_7B, TINY, TRL, WITH_ROOM
from benchmarks.side_by_side import Contestant, Race, compete

# spreads of the logarithm as in the data sets themselves, tails cut
ULTRAFEEDBACK = {"lengths": {"prompt": (284, 1.3), "chosen": (464, 0.9), "rejected": (394, 0.9)}, "longest": 1300}
HH = {"lengths": {"prompt": (127, 1.0), "chosen": (40, 0.87), "rejected": (50, 0.92)}, "longest": 900}
RACES = {
    "ultrafeedback_cpu": Race("DPO, pairs as long as UltraFeedback's", "dpo", model=MODEL, batch=16, steps=5, **ULTRAFEEDBACK, **ON_CPU),
    "hh_cpu": Race("DPO, pairs as long as HH's", "dpo", model=MODEL, batch=16, steps=10, **HH, **ON_CPU),
    "ultrafeedback_gpu": Race(
        "DPO of Qwen3-1.7B's shape, UltraFeedback's lengths", kind="dpo", model=QWEN3_1_7B, batch=32, steps=8, **ULTRAFEEDBACK, **ON_GPU
    ),
    "ultrafeedback_dry": Race("DPO, dry", "dpo", model=TINY, batch=16, steps=3, **(ULTRAFEEDBACK | {"longest": 60}), **ON_GPU),
}
SMALL_BATCH = NO_RECOMPUTING | {"per_device_train_batch_size": 1}  # no padding of pairs to each other; padding_free is off in TRL 1.16
OURS = Contestant("ours", "ours", "posttrain, defaults", stays=True)
PROMPT_TWICE = Contestant("ours_prompt_twice", "ours", "posttrain, --share_prompt=False", {"share_prompt": False}, stays=True)
PLAIN = Contestant("trl_no_checkpointing", "trl", "TRL, no activation checkpointing", NO_RECOMPUTING)
SMALL = Contestant("trl_batch_1", "trl", "TRL, 1 pair a batch, no activation checkpointing", SMALL_BATCH)
ON_GPU_CONTESTANTS = [Contestant("ours", "ours", "posttrain", WITH_ROOM, stays=True), SMALL, TRL]
CONTESTANTS = {
    "ultrafeedback_cpu": [OURS, TRL, PLAIN, SMALL],
    "hh_cpu": [OURS, PROMPT_TWICE, TRL, PLAIN, SMALL],
    "ultrafeedback_gpu": ON_GPU_CONTESTANTS,
    "ultrafeedback_dry": ON_GPU_CONTESTANTS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--race", nargs="*", default=["ultrafeedback_cpu", "hh_cpu"], choices=RACES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="contestants; the first of them is compared with the others")
    options = parser.parse_args()
    for name in options.race:
        chosen = [one for one in CONTESTANTS[name] if not options.only or one.name in options.only]
        compete(f"dpo_{name}", RACES[name], chosen, options.rounds)


if __name__ == "__main__":
    main()
