"""SFT beside TRL: python benchmarks/sft.py [--rounds 5]        writes results/sft_cpu.json

Two ranks, ZeRO-2, bfloat16, a Qwen3 of 7 million parameters, rows as long as Alpaca's (about 110 tokens, from 30 to 560), 32 a step.
TRL with its defaults and with each setting that could make it faster here.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.side_by_side import Contestant, Race, compete  # noqa: E402

MODEL = {
    "vocab_size": 6400,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
RACE = Race(
    kind="sft",
    lengths={"instruction": (22, 0.5), "output": (70, 0.9)},
    longest=500,
    model=MODEL,
    batch=32,
    steps=14,
    ds_config="ds_configs/zero2.json",
    ranks=2,
)
NO_RECOMPUTING = {"gradient_checkpointing": False}
SMALL_BATCH = NO_RECOMPUTING | {"per_device_train_batch_size": 2}  # less padding, as many examples a step
GROUPED = NO_RECOMPUTING | {"train_sampling_strategy": "group_by_length"}
# rows of 1024 tokens, as many a step as make its tokens; TRL 1.16 counts packed rows as examples
PACKING = NO_RECOMPUTING | {"packing": True, "max_length": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
CONTESTANTS = [
    Contestant("ours", "ours", "posttrain, defaults"),
    Contestant("trl", "trl", "TRL, defaults"),
    Contestant("trl_no_checkpointing", "trl", "TRL, no activation checkpointing", NO_RECOMPUTING),
    Contestant("trl_batch_2", "trl", "TRL, 2 rows a batch, no activation checkpointing", SMALL_BATCH),
    Contestant("trl_grouped", "trl", "TRL, rows grouped by length, no activation checkpointing", GROUPED),
    Contestant("trl_packing", "trl", "TRL, packing, no activation checkpointing", PACKING),
    Contestant("trl_packing_compile", "trl", "TRL, packing, torch.compile", PACKING | {"torch_compile": True}),
    Contestant("ours_compile", "ours", "posttrain, --compile", {"compile": True}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="contestants, the first of them is compared with the others")
    parser.add_argument("--name", default="sft_cpu", help="of the result file")
    options = parser.parse_args()
    chosen = [one for one in CONTESTANTS if not options.only or one.name in options.only]
    compete(options.name, RACE, chosen, options.rounds)


if __name__ == "__main__":
    main()
