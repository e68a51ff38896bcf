# ruff: noqa: E402
"""SFT beside TRL, with its defaults and with each setting that could make it faster: python benchmarks/sft.py [--race cpu|gpu|dry]

cpu   two ranks, ZeRO-2, a Qwen3 of 7 million parameters, rows as long as Alpaca's (about 110 tokens, from 30 to 560), 32 a step
gpu   one GPU, ZeRO-1, the shape of Qwen3-1.7B, rows of about 2,000 tokens, 16 a step
dry   as gpu with a tiny model and three steps, to try the script where there is no GPU; its figures mean nothing

All in bfloat16 with float32 master weights; in float32 on a CPU without instructions for bfloat16. Writes results/sft_RACE.json
(in float32 sft_RACE_float32.json). Rows are made up of random words, or drawn from a file, of any kind that data_prep/prepare_sft.py
reads, with a fixed seed; the results are then in sft_NAME_RACE.json:

    python benchmarks/sft.py --rows gsm8k/train.jsonl --tokenizer FOLDER --name gsm8k
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.side_by_side import Contestant, Given, Race, compete, draw_rows, dtype_of_cpu, has_room

MODEL = {
    "vocab_size": 6400,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
QWEN3_1_7B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
TINY = MODEL | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
ALPACA = {"instruction": (22, 0.5), "output": (75, 0.9)}
LONG = {"instruction": (30, 0.1), "output": (3000, 0.1)}
ON_CPU = {"ranks": 2, "ds_config": "ds_configs/zero2.json", "dtype": dtype_of_cpu()}
ON_GPU = {"ranks": 1, "ds_config": "ds_configs/zero1.json"}
RACES = {
    "cpu": Race("SFT, rows as long as Alpaca's", "sft", lengths=ALPACA, longest=500, model=MODEL, batch=32, steps=14, **ON_CPU),
    "gpu": Race(
        "SFT of Qwen3-1.7B's shape, 2,000 tokens", kind="sft", lengths=LONG, longest=1900, model=QWEN3_1_7B, batch=16, steps=10, **ON_GPU
    ),
    "dry": Race("SFT, dry", "sft", lengths=LONG, longest=200, model=TINY, batch=16, steps=3, **ON_GPU),
}
NO_RECOMPUTING = {"gradient_checkpointing": False}
SMALL_BATCH = NO_RECOMPUTING | {"per_device_train_batch_size": 2}  # less padding, or less memory; as many examples a step
GROUPED = NO_RECOMPUTING | {"train_sampling_strategy": "group_by_length"}
# rows of 1024 tokens, as many a step as make its tokens; TRL 1.16 counts packed rows as examples
PACKING = NO_RECOMPUTING | {"packing": True, "max_length": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
TRL = Contestant("trl", "trl", "TRL, defaults", stays=True)
COMMON = [TRL, Contestant("trl_batch_2", "trl", "TRL, 2 rows a batch, no activation checkpointing", SMALL_BATCH)]
WITH_ROOM = {"max_tokens_per_gpu": 32768 if has_room() else 8192}
ON_GPU_CONTESTANTS = [
    Contestant("ours", "ours", "posttrain", WITH_ROOM, stays=True),
    Contestant("ours_compile", "ours", "posttrain, --compile", WITH_ROOM | {"compile": True}),
    Contestant("trl_liger", "trl", "TRL, liger kernels, no activation checkpointing", NO_RECOMPUTING | {"use_liger_kernel": True}),
    *COMMON,
    Contestant("trl_compile", "trl", "TRL, 2 rows a batch, torch.compile", SMALL_BATCH | {"torch_compile": True}),
]
CONTESTANTS = {
    "cpu": [
        Contestant("ours", "ours", "posttrain, defaults", stays=True),
        *COMMON,
        Contestant("trl_no_checkpointing", "trl", "TRL, no activation checkpointing", NO_RECOMPUTING),
        Contestant("trl_grouped", "trl", "TRL, rows grouped by length, no activation checkpointing", GROUPED),
        Contestant("trl_packing", "trl", "TRL, packing, no activation checkpointing", PACKING, stays=True),
        Contestant("trl_packing_compile", "trl", "TRL, packing, torch.compile", PACKING | {"torch_compile": True}),
        Contestant("ours_compile", "ours", "posttrain, --compile", {"compile": True}),
    ],
    "gpu": ON_GPU_CONTESTANTS,
    "dry": ON_GPU_CONTESTANTS,
}


def on_rows(options: argparse.Namespace, race: Race, contestants: list[Contestant]) -> tuple[Race, list[Contestant], Given]:
    """Return the race on rows of the file that the options name, with contestants that suit them. Raises ValueError or OSError."""
    given = {f"--{name}": getattr(options, name) for name in ("rows", "tokenizer", "name")}
    if not all(given.values()):
        lacks = ", ".join(name for name, value in given.items() if not value)
        raise ValueError(f"a race on rows of a file needs --rows FILE, --tokenizer FOLDER and --name NAME; missing: {lacks}")
    if not options.rows.is_file():
        raise FileNotFoundError(f"--rows {options.rows}: there is no such file")
    if not options.tokenizer.exists():
        raise FileNotFoundError(f"--tokenizer {options.tokenizer}: there is no such folder")
    rows = draw_rows(options.rows, str(options.tokenizer), race.batch * race.steps, race.model["max_position_embeddings"])
    packed = max(1, round(race.batch * rows.mean_tokens / race.ranks / PACKING["max_length"]))
    suiting = [
        replace(one, options=one.options | {"per_device_train_batch_size": packed}) if one.options.get("packing") else one
        for one in contestants
    ]
    model = race.model | {"vocab_size": max(race.model["vocab_size"], rows.vocabulary)}
    shown = f"{race.shown.partition(',')[0]}, rows of {options.name}"
    return replace(race, shown=shown, lengths={}, model=model), suiting, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--race", default="cpu", choices=RACES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="contestants; the first of them is compared with the others")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="real rows; with --tokenizer and --name")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="for these rows; the model's vocabulary is at least as large")
    parser.add_argument("--name", help="of these rows, in tables and in the name of the result file")
    options = parser.parse_args()
    race, given, name = RACES[options.race], None, f"sft_{options.race}"
    chosen = [one for one in CONTESTANTS[options.race] if not options.only or one.name in options.only]
    if options.rows or options.tokenizer or options.name:
        try:
            race, chosen, given = on_rows(options, race, chosen)
        except (ValueError, OSError) as error:
            sys.exit(f"sft.py: {error}")
        name = f"sft_{options.name}_{options.race}"
    compete(name, race, chosen, options.rounds, given)


if __name__ == "__main__":
    main()
